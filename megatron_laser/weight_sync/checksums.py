"""Do the servers hold what the trainer sent? Their checksums against ours, parameter by parameter and rank by rank,
after an update and while generation is still paused.

SGLang keeps query, key and value in one parameter and gate and up projection in another, and every tensor-parallel rank
a share of them: ours are made of the streamed tensors' shares in that order (`sglang/srt/layers/linear.py` and
`vocab_parallel_embedding.py`, 0.5.23). All experts of a layer are in two parameters, [experts, gate and up rows,
hidden] and [experts, hidden, down columns] (`layers/moe/fused_moe_triton/layer.py`); their matrices come in any order.
Scales of FP8 matrices (`fp8.py`) are fused and spread as the matrices are, in blocks of 128 rows and columns.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_laser.config.model_folder.quantized import BLOCK, SCALE_SUFFIX
from megatron_laser.rollout.client.errors import ServerFault, StaleServer
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.server_weights import rank_checksums
from megatron_laser.rollout.sglang_api import (
    CHECKSUM_BODY,
    WEIGHTS_CHECKER,
    WireError,
)
from megatron_laser.weight_sync.hashes import ParameterHash, Sha256, TileSums
from megatron_laser.weight_sync.update import Update, on_cpu

logger = logging.getLogger(__name__)

_PHASE = "comparing checksums"
_SECONDS = 300.0
_SHOWN = 3  # parameters in a message
_VERSIONS = (
    2  # the first weights sent are often those that servers have loaded: only the next ones prove an update
)

_WEIGHT = f"weight(?:{SCALE_SUFFIX})?"
_FUSED = (
    (re.compile(rf"(.*\.self_attn\.)[qkv]_proj\.({_WEIGHT}|bias)"), r"\1qkv_proj.\2"),
    (re.compile(rf"(.*\.mlp\.)(?:gate|up)_proj\.({_WEIGHT})"), r"\1gate_up_proj.\2"),
)
_EXPERT = re.compile(rf"(.*\.experts)\.(\d+)\.(?:(gate_proj|w1)|(up_proj|w3)|(down_proj|w2))\.({_WEIGHT})")
_EXPERTS = re.compile(rf".*\.experts\.(?:w13|w2)_{_WEIGHT}")
_BY_ROWS = re.compile(rf".*\.(q|gate|up)_proj\.({_WEIGHT}|bias)|.*\.experts\.\d+\.w[13]\.{_WEIGHT}")
_KEY_VALUE = re.compile(rf".*\.self_attn\.[kv]_proj\.({_WEIGHT}|bias)")
_BY_COLUMNS = re.compile(rf".*\.(o|down)_proj\.{_WEIGHT}|.*\.experts\.\d+\.w2\.{_WEIGHT}")
_PADDED = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64  # SGLang pads the vocabulary's rows with zeros to a multiple of this


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """What of the servers' parameters does not show in the stream.

    Attributes:
        heads: query heads of the model; None: unknown, and shares of query, key and value are not compared.
    """

    heads: int | None = None


class StreamDigest:
    """Passes a weight stream on and notes what servers should report afterwards."""

    def __init__(
        self,
        *,
        on_cpu: bool,
        sizes: Collection[int] = (1,),
        layout: ServerLayout | None = None,
    ) -> None:
        """
        Args:
            on_cpu: the servers compute on CPUs, whose checksums are others.
            sizes: tensor-parallel sizes of the servers.
        """
        self.layout = layout or ServerLayout()
        self._hash: type[ParameterHash] = Sha256 if on_cpu else TileSums
        self._sums: dict[tuple[int, int], dict[str, ParameterHash]] = {
            (size, rank): {} for size in sizes for rank in range(size)
        }
        self._head_size: dict[str, int] = {}  # by layer

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same stream, which has what the servers shall hold (`fp8.py:as_served`)."""
        for name, tensor in weights:
            self._add(name, tensor.detach())
            yield name, tensor

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        layer, heads = name.split(".self_attn.")[0], self.layout.heads
        if heads is not None and re.fullmatch(r".*\.self_attn\.q_proj\.(weight|bias)", name):
            self._head_size[layer] = len(tensor) // heads
        for (size, rank), sums in self._sums.items():
            share = _share(name, tensor, rank, size, self._head_size.get(layer))
            if share is not None:
                sums.setdefault(server_name(name), self._hash()).add(share, _place(name, share))

    @property
    def has_experts(self) -> bool:
        """Whether the stream had experts."""
        return any(_EXPERTS.fullmatch(name) for sums in self._sums.values() for name in sums)

    def sums(self, size: int = 1, rank: int = 0) -> dict[str, str]:
        """What rank `rank` of `size` should report: its parameter's name -> 16 hex digits."""
        return {name: digest.hexdigest() for name, digest in self._sums.get((size, rank), {}).items()}


def _share(
    name: str, tensor: torch.Tensor, rank: int, size: int, head_size: int | None
) -> torch.Tensor | None:
    """What a server's rank has of a tensor; None: not known."""
    if name in _PADDED:
        return _vocabulary_share(tensor, rank, size)
    if size == 1:
        return tensor
    if _KEY_VALUE.fullmatch(name):
        if head_size is None:
            return None
        heads = len(tensor) * (BLOCK if name.endswith(SCALE_SUFFIX) else 1) // head_size
        if heads < size:  # each head is held by several ranks
            rank, size = rank // (size // heads), heads
        return tensor.chunk(size)[rank]
    if _BY_ROWS.fullmatch(name):
        return None if head_size is None and ".self_attn." in name else tensor.chunk(size)[rank]
    if _BY_COLUMNS.fullmatch(name):
        return tensor.chunk(size, dim=1)[rank]
    return tensor


def _vocabulary_share(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    multiple = _VOCABULARY_MULTIPLE
    if -(-len(tensor) // multiple) * multiple % size:
        multiple *= size
    rows = -(-len(tensor) // multiple) * multiple // size
    share = tensor[rank * rows : (rank + 1) * rows]
    missing = rows - len(share)
    return torch.cat([share, share.new_zeros(missing, tensor.shape[1])]) if missing else share


def server_name(name: str) -> str:
    """SGLang's parameter that holds the Hugging Face tensor `name`."""
    for pattern, replacement in _FUSED:
        if pattern.fullmatch(name):
            return pattern.sub(replacement, name)
    if match := _EXPERT.fullmatch(name):
        return f"{match[1]}.{'w2' if match[5] else 'w13'}_{match[6]}"
    return name


def _place(name: str, share: torch.Tensor) -> int | None:
    """The byte of the server's parameter where the share of an expert's matrix begins; None: behind the one before."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    matrices = int(match[2]) if match[5] else 2 * int(match[2]) + bool(match[4])
    return matrices * share.nbytes


def no_checksums(reported: Any) -> str | None:
    """Why a server's `WEIGHTS_CHECKER` answer cannot be compared, and so must not pass for one that agrees.

    None when it can.
    """
    try:
        rank_checksums(reported)
    except WireError as error:
        return f"its answer has no checksums: {error}"
    return None


def not_compared(digest: StreamDigest, size: int) -> str | None:
    """Why servers of tensor-parallel size `size` cannot be compared with the trainer, or not wholly; None: they are."""
    if size > 1 and digest.layout.heads is None:
        return "how query, key and value are spread over their ranks is not known"
    return None


def differences(digest: StreamDigest, reported: Any, *, experts: bool = True) -> list[str]:
    """What of a server's `WEIGHTS_CHECKER` answer differs from what was sent; empty when all agrees.

    Args:
        experts: False: those of experts are passed over.
    """
    ranks = rank_checksums(reported)
    wrong = []
    for index, rank in enumerate(ranks):
        number = index if rank.rank is None else rank.rank
        where = f"rank {number}, " if len(ranks) > 1 else ""
        sums, theirs = digest.sums(len(ranks), number), rank.parameters
        if not sums:
            wrong.append(
                f"{where}its tensor-parallel size is {len(ranks)}, not what it was when it was asked"
            )
        for name, ours in sums.items():
            if not experts and _EXPERTS.fullmatch(name):
                continue
            if name in theirs and theirs[name] != ours:
                wrong.append(f"{where}{name}: {theirs[name]} instead of {ours}")
            elif name not in theirs and not _may_be_tied(name, theirs):
                wrong.append(f"{where}{name}: the server has no such parameter")
    return wrong


def fingerprint(reported: Any) -> tuple[str, ...]:
    """What must be equal on all servers of one tensor-parallel size."""
    return tuple(rank.total for rank in sorted(rank_checksums(reported), key=lambda rank: rank.place))


def _may_be_tied(name: str, theirs: Mapping[str, str]) -> bool:
    return name == "lm_head.weight" and "model.embed_tokens.weight" in theirs


class Checks:
    """Which syncs are verified: every one, or the first weights and the first other ones."""

    def __init__(self, *, always: bool, layout: ServerLayout | None = None) -> None:
        self._always = always
        self._layout = layout or ServerLayout()
        self._versions: set[int] = set()
        self._said: set[str] = set()

    def digest(self, members: list[Member], version: int) -> StreamDigest | None:
        """For the stream of `version` that `members` are about to get; None: that sync is not verified."""
        if not (self._always or (len(self._versions) < _VERSIONS and version not in self._versions)):
            return None
        sizes = {member.tensor for member in members}
        return StreamDigest(on_cpu=on_cpu(members), sizes=sizes, layout=self._layout)

    def verify(self, update: Update, digest: StreamDigest | None, version: int) -> None:
        """Drops every server of `update` whose weights are not those that `digest` saw; nothing for None.

        Raises SyncFailed when none is left.
        """
        if digest is None:
            return
        for size in {member.tensor for member in update.members}:
            reason = not_compared(digest, size)
            if reason is not None and reason not in self._said:
                self._said.add(reason)
                logger.warning(
                    "weights of servers are not compared with the trainer's, or not all, but with each other only: %s",
                    reason,
                )
        if digest.has_experts:
            for member in update.members:
                if member.expert_storage and member.expert_storage not in self._said:
                    self._said.add(member.expert_storage)
                    logger.warning(
                        "experts of servers are not compared with the trainer's, but with each other only: "
                        "%s runs with %s, which stores them in another order",
                        member.url,
                        member.expert_storage,
                    )
        verify(update, digest)
        self._versions.add(version)


def verify(update: Update, digest: StreamDigest) -> None:
    """See `Checks.verify`."""
    reports = update.post_all(WEIGHTS_CHECKER, CHECKSUM_BODY, phase=_PHASE, seconds=_SECONDS)
    for member, report in reports.items():
        unclear = no_checksums(report)
        if unclear is not None:
            update.drop(member, ServerFault(member.url, _PHASE, unclear))
            continue
        wrong = differences(digest, report, experts=not member.expert_storage)
        if wrong:
            shown = "; ".join(wrong[:_SHOWN]) + (
                f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            )
            update.drop(
                member, StaleServer(member.url, _PHASE, f"its weights are not the trainer's: {shown}")
            )
    _compare_servers(
        update, {member: report for member, report in reports.items() if member in update.members}
    )
    update.require_members()


def _compare_servers(update: Update, reports: dict[Member, Any]) -> None:
    groups: dict[int, dict[tuple[str, ...], list[Member]]] = defaultdict(lambda: defaultdict(list))
    for member, report in reports.items():
        groups[member.tensor][fingerprint(report)].append(member)
    for same in groups.values():
        largest = max(same.values(), key=len)
        for members in same.values():
            if members is not largest:
                for member in members:
                    message = f"its weights differ from those of {largest[0].url}, which got the same update"
                    update.drop(member, StaleServer(member.url, _PHASE, message))
