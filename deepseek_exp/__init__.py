"""A declarative experiment platform for DeepSeek-style language models."""

__version__ = "0.1.0"
