"""Which experts an engine sent tokens to: asked of SGLang, read from its answers, and joined.

SGLang 0.5.23 reports it with `return_routed_experts` where it was started with --enable-return-routed-experts: int32
in base64, [tokens, layers, experts_per_token], from `routed_experts_start_len` to the last token but one, which is the
last that was fed. Tokens whose keys and values came from the prefix cache are among them: it keeps experts by cache
slot. An aborted request that was running tells them, too; one that was still queued does not.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laser.config.server_options import UNNOTED_BACKENDS
from megatron_laser.rollout.sglang_api import WireError
from megatron_laser.types import Generation, RoutingShape

Routed = npt.NDArray[np.uint8 | np.int16]


class WrongExperts(WireError):
    """Experts that the model does not have, or that were never noted: the next answer would have such, too."""


def known_tokens(generation: Generation | None) -> int:
    """Of how many first tokens the experts are known already."""
    routed = None if generation is None else generation.routed_experts
    return 0 if routed is None else len(routed)


def routing_request(shape: RoutingShape | None, known: int) -> dict[str, Any]:
    """What a generation's body says besides, to be told the experts of all tokens behind the first `known`."""
    if shape is None:
        return {}
    return {"return_routed_experts": True, "routed_experts_start_len": known}


def has_routing(answer: Any) -> bool:
    """Whether an answer tells experts, so that reading it takes a while."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    return isinstance(meta, dict) and meta.get("routed_experts") is not None


def parse_routing(answer: Any, shape: RoutingShape, *, tokens: int) -> Routed | None:
    """The experts in the answer to a request that asked for those of `tokens` tokens; None where it has none.

    An answer to an aborted request may have fewer. Raises WrongExperts when they are of another model, or were never
    noted: SGLang then answers with its buffer's zeros, expert 0 twice.
    """
    text = answer["meta_info"].get("routed_experts")
    if text is None:
        return None
    try:
        flat = np.frombuffer(b"".join(_decoded(text)), dtype=np.int32)
    except (TypeError, ValueError, binascii.Error) as error:
        raise WrongExperts(f"routed_experts that are no int32 in base64: {error}") from error
    row = shape.layers * shape.experts_per_token
    if len(flat) % row or len(flat) // row > tokens:
        raise WrongExperts(
            f"{len(flat)} routed_experts: expected {tokens} tokens x {shape.layers} layers x "
            f"{shape.experts_per_token} experts"
        )
    if len(flat) and flat.view(np.uint32).max() >= shape.num_experts:  # a negative one is a large one then
        raise WrongExperts(
            f"routed_experts from {flat.min()} to {flat.max()}: the model has experts 0 to {shape.num_experts - 1}"
        )
    routed: Routed = flat.reshape(-1, shape.layers, shape.experts_per_token).astype(shape.dtype)
    # Two of them tell a row of zeros, and this runs for every response.
    if shape.experts_per_token > 1 and (twice := routed[..., 0] == routed[..., 1]).any():
        token, layer = np.argwhere(twice)[0].tolist()
        raise WrongExperts(
            f"routed_experts send token {token} of layer {layer} to expert {routed[token, layer, 0]} twice: the server "
            f"does not note them, as with moe_runner_backend {', '.join(UNNOTED_BACKENDS)}; start it with "
            "--moe-runner-backend triton"
        )
    return routed


_PIECE = 2**20  # characters: the interpreter's lock is held that long, and a multiple of 4


def _decoded(text: str | bytes) -> Iterator[bytes]:
    """base64.b64decode(text, validate=True), piece by piece. Raises as that does."""
    characters = text.encode("ascii") if isinstance(text, str) else text
    view = memoryview(characters)
    for start in range(0, len(view), _PIECE):
        piece = binascii.a2b_base64(view[start : start + _PIECE], strict_mode=True)
        if len(piece) < _PIECE // 4 * 3 and start + _PIECE < len(view):
            raise ValueError("padding before the end")
        yield piece


def joined_routing(partial: Generation | None, later: Routed | None) -> Routed | None:
    """What is known of a response after an answer that began where `partial` ends."""
    earlier = None if partial is None else partial.routed_experts
    if earlier is None or later is None:
        return earlier if later is None else later
    return np.concatenate([earlier, later])
