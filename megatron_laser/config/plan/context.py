"""What context parallelism means for a rank: its tokens, its attention's buffers and messages, and why it is needed.

With T tokens of a micro-batch on each of C context ranks, k and q the widths of keys and queries, t tensor size and b
bytes a number, KV = 2 b T k / t bytes are a rank's keys and values of one layer.

Transformer Engine's ring (`AttnFuncWithCPAndKVP2P`, read in 2.20.2, not run on a GPU yet): in the forward each rank
passes what it holds on to the next C - 1 times, through two buffers of KV; in the backward C - 1 times keys and values
and C - 1 times their gradients, through two buffers of each, 4 KV in all and one layer at a time. For the backward it
keeps rotated queries, one KV and its output, less than the 3 q + 3 k of `memory`'s formula, which stays the bound.

torch's attention gathers the KV of all C T tokens, with a copy of each key head for every query head, 2 b C T q / t,
keeps it with the masks (b bytes for each of T queries and each key of its sequence) in every layer, and adds the
gradients up in float32: for checking, not for long sequences.

Labelled rows are not shared as evenly as tokens: a rank has those of its two chunks of each sequence, from none to all
of its T tokens. So T bounds the head's rows on every rank, as without context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_laser.config.derived import (
    gpu_pad_multiple,
    micro_batch_tokens,
    padded_tokens,
)
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.continuation import longest_trained
from megatron_laser.config.model_folder.parameters import DTYPE_BYTES
from megatron_laser.config.schema.root import RunConfig


@dataclass(frozen=True, slots=True)
class AttentionBytes:
    """What context parallelism adds to the attention of one layer on one rank.

    kept: until the layer's backward. buffers: while its attention runs. forward, backward: sent to other ranks.
    """

    kept: int
    buffers: int
    forward: int
    backward: int


@dataclass(frozen=True, slots=True)
class ContextShare:
    """How `ranks` share sequences: `on_rank` of the longest's tokens, padding included, are on each of them.

    needed: the longest has more tokens than `batching.tokens_per_micro_batch`, one rank's.
    """

    ranks: int
    longest: int
    on_rank: int
    needed: bool
    attention: AttentionBytes


def rank_tokens(config: RunConfig, replica_tokens: int) -> int:
    """Tokens of the longest micro-batch on one rank, padding included.

    Args: replica_tokens: all that a data-parallel replica has in an optimizer step, each sequence padded.
    """
    longest = padded_tokens(longest_trained(config), config.parallel)
    # A sequence that is as long as the budget is padded beyond it, and then is a micro-batch of its own.
    most = min(max(micro_batch_tokens(config), longest), replica_tokens)
    pad = gpu_pad_multiple(config)
    return -(-most // pad) * pad // config.parallel.context


def attention_bytes(config: RunConfig, architecture: Architecture, tokens: int) -> AttentionBytes:
    """The module's formulas, for T = `tokens`; all 0 without context parallelism."""
    context, t = config.parallel.context, config.parallel.tensor
    if context == 1:
        return AttentionBytes(0, 0, 0, 0)
    b = DTYPE_BYTES[config.model.dtype]
    own = 2 * tokens * architecture.num_key_value_heads * architecture.head_dim // t
    if _rings(config):
        return AttentionBytes(
            kept=0, buffers=4 * b * own, forward=(context - 1) * b * own, backward=2 * (context - 1) * b * own
        )
    repeated = 2 * b * context * tokens * architecture.num_attention_heads * architecture.head_dim // t
    masks = b * tokens * min(context * tokens, padded_tokens(longest_trained(config), config.parallel))
    return AttentionBytes(
        kept=repeated + masks,
        buffers=repeated + 4 * context * own,
        forward=(context - 1) * b * own,
        backward=(context - 1) * 4 * own,
    )


def context_share(config: RunConfig, architecture: Architecture, replica_tokens: int) -> ContextShare | None:
    """What a dry run says; None without context parallelism. `replica_tokens` as for `rank_tokens`."""
    context = config.parallel.context
    if context == 1:
        return None
    longest = longest_trained(config)
    return ContextShare(
        ranks=context,
        longest=longest,
        on_rank=padded_tokens(longest, config.parallel) // context,
        needed=longest > config.batching.tokens_per_micro_batch,
        attention=attention_bytes(config, architecture, rank_tokens(config, replica_tokens)),
    )


def ring_neighbours(config: RunConfig) -> int:
    """Pairs of ranks on each rank that have a communicator of their own for the ring.

    Transformer Engine 2.20.2 sends and receives singly, but for two ranks on GPUs before Blackwell, and NCCL makes a
    communicator for each pair then.
    """
    return 2 if config.parallel.context > 2 and _rings(config) else 0


def _rings(config: RunConfig) -> bool:
    """Whether Transformer Engine's attention runs: float32 takes torch's in its layers, too."""
    return config.model.layers != "torch" and config.model.dtype != "float32"
