"""Measurements behind `megatron-laser bench`."""
