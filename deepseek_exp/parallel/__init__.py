"""Checkpoints of a run, and what spreads it over processes."""
