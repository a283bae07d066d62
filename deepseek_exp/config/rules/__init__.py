"""Validation rules, one file per section of the configuration. Does not import torch."""
