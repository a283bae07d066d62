"""Compose an experiment, check it, and do what it says: `python run.py --help`."""

from deepseek_exp.commands.dispatch import main

if __name__ == "__main__":
    main()
