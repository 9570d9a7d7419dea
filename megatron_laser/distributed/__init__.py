"""The ranks of a run: meeting, process groups, rank 0's lead, signs of life, arrays from one to all."""
