"""Is this an SGLang server that this run can use? Asked before any expensive work."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_laser.rollout.sglang.client import ServerClient
from megatron_laser.rollout.sglang.errors import ServerError, ServerMismatch, ServerRefused
from megatron_laser.rollout.sglang.fleet import Member

MIN_SGLANG = (0, 5, 23)
"""Weight-update sessions (`/begin_weight_update`) and spans of weight versions are as of this release."""

_PHASE = "identifying the server"
_TESTED_DTYPES = {"float32": {"float32", "torch.float32"}, "bfloat16": {"bfloat16", "torch.bfloat16", "auto"}}


@dataclass(frozen=True, slots=True)
class Expected:
    """What the trainer trains.

    Attributes:
        vocab_size: token ids are below it.
        model_type: of config.json; None: any.
        dtype: `model.dtype`; None: any.
        longest: tokens of the longest prompt with its response; None: not checked.
    """

    vocab_size: int
    model_type: str | None = None
    dtype: str | None = None
    longest: int | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself."""

    sglang_version: str
    tensor: int
    model_path: str
    weight_version: str
    device: str  # "cpu", "cuda"


async def identify_members(
    members: Sequence[Member], expected: Expected, *, deadline: float
) -> dict[Member, ServerFacts | ServerError]:
    """Ask servers at once who they are; notes on each its tensor-parallel size and device."""

    async def ask(member: Member) -> ServerFacts | ServerError:
        try:
            facts = await identify(member.client, expected, deadline=deadline)
        except ServerError as error:
            return error
        member.tensor, member.device = facts.tensor, facts.device
        return facts

    return dict(zip(members, await asyncio.gather(*(ask(member) for member in members))))


async def identify(client: ServerClient, expected: Expected, *, deadline: float) -> ServerFacts:
    """Ask one server who it is.

    Raises:
        ServerMismatch: it cannot be used; says what differs and what to do.
        ServerError: it does not answer.
    """
    url = client.url
    try:
        info = await client.get("/model_info", deadline=deadline, phase=_PHASE)
        server = await client.get("/server_info", deadline=deadline, phase=_PHASE)
    except ServerRefused as error:
        if "answered 40" in str(error) and ("answered 401" in str(error) or "answered 403" in str(error)):
            raise
        raise ServerMismatch(url, _PHASE, f"this is no SGLang server: {error}") from error
    if not (isinstance(info, dict) and isinstance(server, dict) and "weight_version" in info):
        raise ServerMismatch(url, _PHASE, "this is no SGLang server: /model_info names no weight_version")
    problems = mismatches(info, server, expected)
    if problems:
        raise ServerMismatch(url, _PHASE, "; ".join(problems))
    return ServerFacts(
        str(server.get("version", "")),
        int(server.get("tp_size") or 1),
        str(info.get("model_path")),
        str(info["weight_version"]),
        str(server.get("device") or "cuda"),
    )


def mismatches(info: dict[str, Any], server: dict[str, Any], expected: Expected) -> list[str]:
    """What of a server's `/model_info` and `/server_info` does not fit the run; pure."""
    problems = []
    version = str(server.get("version", ""))
    if parse_version(version) < MIN_SGLANG:
        needed = ".".join(map(str, MIN_SGLANG))
        problems.append(
            f"SGLang {version or 'of unknown version'}; {needed} or newer is needed: its servers take weights in "
            "sessions and say which weights sampled which token"
        )
    if not info.get("is_generation", True):
        problems.append("it serves an embedding model, which generates nothing")
    if expected.model_type is not None and info.get("model_type") not in (None, expected.model_type):
        problems.append(
            f"it serves a {info.get('model_type')} model from {info.get('model_path')}, but model.path is a "
            f"{expected.model_type}; start it with the trainer's model.path"
        )
    dtype = str(server.get("dtype"))
    if expected.dtype is not None and dtype not in _TESTED_DTYPES[expected.dtype]:
        problems.append(
            f"it computes in {dtype}, model.dtype is {expected.dtype}; start it with --dtype {expected.dtype}"
        )
    limit = server.get("max_req_input_len")
    if expected.longest is not None and isinstance(limit, int) and limit < expected.longest:
        problems.append(
            f"it takes {limit} tokens, but data.max_prompt_tokens + rollout.max_new_tokens is {expected.longest} "
            "(a response is sent back whole to be scored or resumed); raise its --context-length or "
            "--max-total-tokens, or lower those settings"
        )
    vocabulary = server.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary < expected.vocab_size:
        problems.append(f"its vocabulary has {vocabulary} tokens, the trainer's {expected.vocab_size}")
    return problems


def parse_version(text: str) -> tuple[int, ...]:
    """ "0.5.23rc1" -> (0, 5, 23); unreadable: ()."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()
