"""Resolve a command line into jobs. Does not import torch."""
