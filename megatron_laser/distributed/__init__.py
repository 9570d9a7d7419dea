"""The ranks of a run: meeting, process groups, work on rank 0 alone, signs of life, arrays from one to all."""
