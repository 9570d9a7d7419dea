"""Checkpoints: sharded through Megatron's dist_checkpointing, published atomically, loadable by any layout."""
