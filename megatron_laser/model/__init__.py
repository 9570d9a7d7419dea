"""Megatron-Core model: platform layer, layer specs, log-prob head and the Hugging Face mapping."""
