"""From a command line to a job that is fully resolved; without torch."""
