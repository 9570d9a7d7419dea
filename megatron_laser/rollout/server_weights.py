"""What a server says of the weights in its memory: checksums, whether they are quantized, where experts lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_laser.rollout.sglang_api import WireError


@dataclass(frozen=True, slots=True)
class RankChecksums:
    """What one tensor-parallel rank holds: 16 hex digits by parameter, and one for all.

    `rank`: its number, None: not said. `place`: that and the rest of where it stands, as the server puts it.
    """

    rank: int | None
    parameters: Mapping[str, str]
    total: str
    place: str


def rank_checksums(report: Any) -> list[RankChecksums]:
    """All ranks of a `WEIGHTS_CHECKER` answer, as a server lists them. Raises WireError where it has none."""
    ranks = report.get("ranks") if isinstance(report, dict) else None
    found = []
    for item in ranks if isinstance(ranks, list) and ranks else [None]:
        rank = item if isinstance(item, dict) else {}
        sums, total = rank.get("checksums"), rank.get("per_gpu_checksum")
        if not isinstance(sums, dict) or not total:
            raise WireError(str(report)[:200])
        place = rank.get("parallelism_info")
        first = place[0] if isinstance(place, list) and place else place  # one for each of its models
        number = first.get("tp_rank") if isinstance(first, dict) else None
        found.append(RankChecksums(None if number is None else int(number), sums, str(total), str(place)))
    return found


# Settings of SGLang 0.5.23 with which each tensor-parallel rank has a share of every expert, rows as they come. Expert
# parallelism gives a rank whole experts, its balancing moves them, and other kernels want rows in orders of their own
# (`srt/layers/quantization/unquant.py`). A server tells the kernels that "auto" has become, where that is other ones.
_PLAIN_EXPERTS: dict[str, tuple[Any, ...]] = {
    "ep_size": (1,),
    "ep_num_redundant_experts": (0,),
    "enable_eplb": (False,),
    "moe_a2a_backend": ("none",),
    "moe_runner_backend": ("auto", "triton"),
}


def expert_storage(server: Mapping[str, Any]) -> str:
    """Of an answer of `SERVER_INFO`, the settings because of which experts lie otherwise; "" when there is none."""
    return ", ".join(
        f"{name} {server[name]}"
        for name, plain in _PLAIN_EXPERTS.items()
        if server.get(name) is not None and server[name] not in plain
    )


def quantization(server: Mapping[str, Any]) -> str | None:
    """Of an answer of `SERVER_INFO`, SGLang's name for how weights are quantized; None: they are not."""
    method = server.get("quantization")
    return None if method in (None, "", "unquant") else str(method)


def weight_blocks(server: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows and columns that have one scale, by the configuration that a server was started with; None: not said."""
    try:
        blocks = json.loads(server["json_model_override_args"])["quantization_config"]["weight_block_size"]
        return tuple(int(size) for size in blocks)
    except (KeyError, TypeError, ValueError):
        return None
