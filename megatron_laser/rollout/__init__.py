"""Rollouts: the engine protocol, the in-process engine, and the collector of graded groups."""

from megatron_laser.rollout.engine import RolloutEngine

__all__ = ["RolloutEngine"]
