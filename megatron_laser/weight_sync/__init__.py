"""From the trainer to the rollout engine: one stream of Hugging Face tensors, one version, verified."""

from megatron_laser.weight_sync.update import sync_weights

__all__ = ["sync_weights"]
