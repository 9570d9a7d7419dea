"""The command line, for `train_on_ranks` of helpers/ranks.py. In a folder whose modules nobody takes for others."""

from megatron_laser.cli import main

if __name__ == "__main__":
    main()
