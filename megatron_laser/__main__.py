"""`python -m megatron_laser`, also the target of torchrun. Kept tiny: checkpoint writers re-import it."""

import sys

try:
    from megatron_laser.cli import main
except KeyboardInterrupt:  # Ctrl-C before there is anything to say
    sys.exit(130)

if __name__ == "__main__":
    main()
