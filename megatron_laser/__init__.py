"""LaSeR (RL with last-token self-rewarding, arXiv 2510.14943) training on Megatron-Core."""

__version__ = "0.1.0"
