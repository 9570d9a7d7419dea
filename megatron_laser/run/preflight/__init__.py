"""What a run starts from, looked at before anything expensive: model folder, tokenizer, data, reward, disks.

`train` calls `look` and stops at the first error; `megatron-laser check` calls it and prints everything.
"""

from megatron_laser.run.preflight.inputs import Looked, look
from megatron_laser.run.preflight.ledger import CheckFailed, Ledger

__all__ = ["CheckFailed", "Ledger", "Looked", "look"]
