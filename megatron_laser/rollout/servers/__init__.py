"""Starting SGLang servers as child processes and keeping them running; SGLang itself is never imported."""

from megatron_laser.rollout.servers.launcher import ServeProcess
from megatron_laser.rollout.servers.process import ServeError

__all__ = ["ServeError", "ServeProcess"]
