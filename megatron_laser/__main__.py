"""`python -m megatron_laser`, also the target of torchrun. Kept tiny: Megatron's checkpoint writer re-imports it."""

from megatron_laser.cli import main

if __name__ == "__main__":
    main()
