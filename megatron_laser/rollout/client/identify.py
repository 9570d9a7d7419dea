"""Is this an SGLang server that this run can use? Asked before any expensive work."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_laser.rollout.client.errors import (
    ServerError,
    ServerMismatch,
    ServerRefused,
    ServerTimeout,
    StrangeAnswer,
)
from megatron_laser.rollout.client.http import ServerClient
from megatron_laser.rollout.client.member import Member
from megatron_laser.rollout.client.wire import score_body

logger = logging.getLogger(__name__)

MIN_SGLANG = (0, 5, 23)
"""Weight-update sessions (`/begin_weight_update`) and spans of weight versions are as of this release."""

NO_SERVER = f"this is no SGLang server, or one older than {'.'.join(map(str, MIN_SGLANG))}, which is needed"

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Of config.json: they tell a model from a bigger or smaller one of its family."""

_PHASE = "identifying the server"
_VOCABULARY_SECONDS = 10.0  # a paused server keeps requests until it goes on
_TESTED_DTYPES = {"float32": {"float32", "torch.float32"}, "bfloat16": {"bfloat16", "torch.bfloat16", "auto"}}


@dataclass(frozen=True, slots=True)
class Expected:
    """What the trainer trains.

    Attributes:
        vocab_size: token ids are below it.
        model_type: of config.json; None: any.
        dtype: `model.dtype`; None: any.
        longest: tokens of the longest prompt with its response; None: not checked.
        sizes: of config.json, by name; compared where the server's model folder can be read from here.
        tied: whether the output layer is the embedding, compared there, too; None: not compared.
        deterministic: seeds must decide what it samples.
    """

    vocab_size: int
    model_type: str | None = None
    dtype: str | None = None
    longest: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    tied: bool | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself."""

    sglang_version: str
    tensor: int
    model_path: str
    weight_version: str
    device: str  # "cpu", "cuda"
    deterministic: bool = False  # whether seeds decide what it samples


async def identify_members(
    members: Sequence[Member], expected: Expected, *, deadline: float
) -> dict[Member, ServerFacts | ServerError]:
    """Ask servers at once who they are; notes on each its tensor-parallel size, its device, whether it takes seeds."""

    async def ask(member: Member) -> ServerFacts | ServerError:
        try:
            facts = await identify(member.client, expected, deadline=deadline)
        except ServerError as error:
            return error
        member.tensor, member.device = facts.tensor, facts.device
        member.takes_seeds = facts.deterministic
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
    except (ServerRefused, StrangeAnswer) as error:
        raise _no_server(error) from error
    if not (isinstance(info, dict) and isinstance(server, dict) and "weight_version" in info):
        raise ServerMismatch(url, _PHASE, f"/model_info names no weight_version: {NO_SERVER}")
    folder = _config_of(str(info.get("model_path")))
    problems = mismatches(info, server, expected, folder)
    if not problems and "vocab_size" not in server | folder:
        problems = await _vocabulary_problems(client, expected, deadline)
    if problems:
        raise ServerMismatch(url, _PHASE, "; ".join(problems))
    return ServerFacts(
        str(server.get("version", "")),
        int(server.get("tp_size") or 1),
        str(info.get("model_path")),
        str(info["weight_version"]),
        str(server.get("device") or "cuda"),
        _deterministic(server),
    )


def refuse_strangers(members: Sequence[Member]) -> None:
    """Raises ServerMismatch or ServerRefused when one has answered its last probe, but not as an SGLang server does."""
    for member in members:
        if isinstance(member.trouble, ServerRefused | StrangeAnswer):
            raise _no_server(member.trouble)


def _no_server(error: ServerRefused | StrangeAnswer) -> ServerError:
    if isinstance(error, ServerRefused) and error.status in (401, 403):
        return error
    return ServerMismatch(error.url, _PHASE, f"{error.message}: {NO_SERVER}")


async def _vocabulary_problems(client: ServerClient, expected: Expected, deadline: float) -> list[str]:
    """Ask for the log-prob of the trainer's last token: a server checks that id before it does anything."""
    body = score_body([0], expected.vocab_size - 1, rid=uuid.uuid4().hex)
    try:
        await client.request(body, deadline=min(deadline, _VOCABULARY_SECONDS), phase=_PHASE)
    except ServerRefused as error:
        if "vocabulary" not in error.message:
            raise
        return [_smaller_vocabulary(expected, error.message)]
    except ServerTimeout:
        # Paused by a run that was killed, or busy: the first weights that it gets will tell.
        logger.info("server %s: its vocabulary was not compared: it is paused or busy", client.url)
    return []


def _config_of(model_path: str) -> dict[str, Any]:
    """The config.json of a server's model; {} where its folder cannot be read from here."""
    try:
        found = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def mismatches(
    info: dict[str, Any],
    server: dict[str, Any],
    expected: Expected,
    folder: Mapping[str, Any] | None = None,
) -> list[str]:
    """What of a server's `/model_info`, `/server_info` and model folder does not fit the run; pure.

    Args: folder: the config.json of its model; None: not known.
    """
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
    if expected.deterministic and not _deterministic(server):
        problems.append(
            "it was started without --enable-deterministic-inference and ignores seeds; start it with that option "
            "(rollout.sglang.deterministic: true for megatron-laser serve), or set rollout.sglang.deterministic: false"
        )
    if preferred := info.get("preferred_sampling_params"):
        problems.append(
            f"it was started with --preferred-sampling-params {preferred}, which change what it samples behind every "
            "request, while log-probs stay those of the whole distribution; start it without them"
        )
    vocabulary = (server | dict(folder or {})).get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary < expected.vocab_size:
        problems.append(_smaller_vocabulary(expected, f"it has {vocabulary}"))
    found = folder or {}
    problems += _size_problems(info, found, expected) + _tie_problems(info, found, expected)
    return problems + _code_problems(info, found, expected)


def _deterministic(server: Mapping[str, Any]) -> bool:
    return bool(server.get("enable_deterministic_inference"))


def _size_problems(info: dict[str, Any], folder: Mapping[str, Any], expected: Expected) -> list[str]:
    """A bigger or smaller model of the same type."""
    differing = [
        f"{name} {folder.get(name)} instead of {size}"
        for name, size in expected.sizes.items()
        if folder and folder.get(name) != size
    ]
    if not differing:
        return []
    return [
        f"its model {info.get('model_path')} has {', '.join(differing)}; start it with the trainer's model.path"
    ]


def _tie_problems(info: dict[str, Any], folder: Mapping[str, Any], expected: Expected) -> list[str]:
    """A server with tied embeddings drops the output layer that it is sent; one without keeps its own."""
    tied = bool(folder.get("tie_word_embeddings", False))
    if not folder or expected.tied is None or tied == expected.tied:
        return []
    return [
        f"the config.json of its model {info.get('model_path')} says tie_word_embeddings {str(tied).lower()}, that of "
        f"model.path {str(expected.tied).lower()}; start it with the trainer's model.path"
    ]


def _code_problems(info: dict[str, Any], folder: Mapping[str, Any], expected: Expected) -> list[str]:
    """A server of quantized weights would keep its scales beside the plain weights that a run sends."""
    if expected.dtype is None or not folder.get("quantization_config"):
        return []
    return [
        f"the config.json of its model {info.get('model_path')} has a quantization_config, and a run sends plain "
        "weights; start it with the trainer's model.path"
    ]


def _smaller_vocabulary(expected: Expected, found: str) -> str:
    return (
        f"its vocabulary is smaller than the {expected.vocab_size} tokens of model.path ({found}); start it with "
        "the trainer's model.path"
    )


def parse_version(text: str) -> tuple[int, ...]:
    """ "0.5.23rc1" -> (0, 5, 23); unreadable: ()."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()


_SAY_EVERY = 30.0  # seconds between two words


class SayingThatItWaits:
    """A check for `Fleet.wait_until_up`: raises for strangers, and says at once and now and again what is awaited.

    A port at which nobody listens may be a mistake, or a server that starts: only the user knows.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._what = f"waiting up to {seconds:g} s for {count} server{'s' if count != 1 else ''}"
        self._next = 0.0

    def __call__(self, members: Sequence[Member]) -> None:
        refuse_strangers(members)
        now = time.monotonic()
        troubles = [str(member.trouble) for member in members if member.trouble is not None]
        if troubles and now >= self._next:
            self._next = now + _SAY_EVERY
            logger.warning("%s: %s", self._what, "; ".join(troubles))
