"""What a configuration must fulfil, one file per section; without torch."""
