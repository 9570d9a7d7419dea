"""SGLang servers as a rollout engine: client, fleet, health, generation and scoring."""

from megatron_laser.rollout.client.engine import SglangEngine

__all__ = ["SglangEngine"]
