"""`python -m megatron_laser`, also the target of torchrun. Kept tiny: checkpoint writers re-import it."""

from megatron_laser.cli import main

if __name__ == "__main__":
    main()
