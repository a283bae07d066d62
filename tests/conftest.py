"""What holds for all tests."""

from __future__ import annotations

import os

# one thread an operation: the tests run two at a time, and losses stay the same on any number of cores
os.environ["OMP_NUM_THREADS"] = "1"
