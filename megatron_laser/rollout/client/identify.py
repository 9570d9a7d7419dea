"""Is this an SGLang server that this run can use? Asked before any expensive work."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_laser.config.model_folder.quantized import BLOCK
from megatron_laser.config.server_options import replay_problems
from megatron_laser.rollout.client.errors import (
    ServerError,
    ServerMismatch,
    ServerRefused,
    ServerTimeout,
    UnexpectedAnswer,
)
from megatron_laser.rollout.client.fleet import Member
from megatron_laser.rollout.client.http import ServerClient
from megatron_laser.rollout.server_weights import expert_storage, quantization, weight_blocks
from megatron_laser.rollout.sglang_api import (
    MIN_SGLANG,
    MODEL_INFO,
    NO_WEIGHTS,
    SERVER_INFO,
    ServerFacts,
    parse_version,
    score_body,
    server_facts,
    weight_version,
)

_SAY_EVERY = 30.0  # seconds between two words

logger = logging.getLogger(__name__)

NO_SERVER = f"this is no SGLang server, or one older than {'.'.join(map(str, MIN_SGLANG))}, which is needed"

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("moe_intermediate_size", "num_experts_per_tok"),
)
"""Of config.json: they tell a model from a bigger or smaller one of its family. The number of experts is not among
them: it stands there under one of two names."""

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
        quantization: `rollout.sglang.quantization`.
        routing: the experts that it reports must be those it used; one that reports none is used all the same.
    """

    vocab_size: int
    model_type: str | None = None
    dtype: str | None = None
    longest: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    tied: bool | None = None
    deterministic: bool = False
    routing: bool = False
    quantization: str | None = None


async def identify_member(member: Member, expected: Expected, *, deadline: float) -> ServerFacts:
    """Ask a server who it is; notes its tensor-parallel size, its device, and whether it takes seeds.

    Raises as `identify` does.
    """
    facts = await identify(member.client, expected, deadline=deadline)
    member.tensor, member.device = facts.tensor, facts.device
    member.takes_seeds, member.expert_storage = facts.deterministic, facts.expert_storage
    member.unfit = False
    return facts


async def identify_members(
    members: Sequence[Member], expected: Expected, *, deadline: float
) -> dict[Member, ServerFacts | ServerError]:
    """`identify_member` for all at once: what each says, or why it cannot be used."""

    async def ask(member: Member) -> ServerFacts | ServerError:
        try:
            return await identify_member(member, expected, deadline=deadline)
        except ServerError as error:
            return error

    return dict(zip(members, await asyncio.gather(*(ask(member) for member in members))))


async def identify(client: ServerClient, expected: Expected, *, deadline: float) -> ServerFacts:
    """Ask one server who it is.

    Raises:
        ServerMismatch: it cannot be used; says what differs and what to do.
        ServerError: it does not answer.
    """
    url = client.url
    try:
        info = await client.get(MODEL_INFO, deadline=deadline, phase=_PHASE)
        server = await client.get(SERVER_INFO, deadline=deadline, phase=_PHASE)
    except (ServerRefused, UnexpectedAnswer) as error:
        raise _no_server(error) from error
    if not isinstance(server, dict) or weight_version(info) is None:
        raise ServerMismatch(url, _PHASE, f"{MODEL_INFO} names no weight_version: {NO_SERVER}")
    facts = replace(
        server_facts(info, server),
        quantization=quantization(server),
        weight_blocks=weight_blocks(server),
        expert_storage=expert_storage(server),
        replay_problems=tuple(replay_problems(server, prefix="its option ")),
    )
    folder = _config_of(facts.model_path)
    problems = mismatches(facts, expected, folder)
    unknown = facts.vocab_size is None and "vocab_size" not in folder
    if not problems and unknown and facts.weight_version != NO_WEIGHTS:  # which cannot answer that yet
        problems = await _vocabulary_problems(client, expected, deadline)
    if problems:
        raise ServerMismatch(url, _PHASE, "; ".join(problems))
    return facts


def refuse_other_servers(members: Sequence[Member]) -> None:
    """Raises ServerMismatch or ServerRefused when one has answered its last probe, but not as an SGLang server does."""
    for member in members:
        if isinstance(member.probe_error, ServerRefused | UnexpectedAnswer):
            raise _no_server(member.probe_error)


def _no_server(error: ServerRefused | UnexpectedAnswer) -> ServerError:
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


def mismatches(facts: ServerFacts, expected: Expected, folder: Mapping[str, Any] | None = None) -> list[str]:
    """What of a server and its model folder does not fit the run; pure.

    Args: folder: the config.json of its model; None: not known.
    """
    problems = []
    found = folder or {}
    version = facts.sglang_version
    if parse_version(version) < MIN_SGLANG:
        needed = ".".join(map(str, MIN_SGLANG))
        problems.append(
            f"SGLang {version or 'of unknown version'}; {needed} or newer is needed: its servers take weights in "
            "sessions and say which weights sampled which token"
        )
    if not facts.generates:
        problems.append("it serves an embedding model, which generates nothing")
    if expected.model_type is not None and facts.model_type not in (None, expected.model_type):
        problems.append(
            f"it serves a {facts.model_type} model from {facts.model_path}, but model.path is a "
            f"{expected.model_type}; start it with the trainer's model.path"
        )
    if expected.dtype is not None and facts.dtype not in _TESTED_DTYPES[expected.dtype]:
        problems.append(
            f"it computes in {facts.dtype}, model.dtype is {expected.dtype}; start it with --dtype {expected.dtype}"
        )
    problems += _quantization_problems(facts, expected)
    limit = facts.longest_input
    if expected.longest is not None and limit is not None and limit < expected.longest:
        problems.append(
            f"it takes {limit} tokens, but data.max_prompt_tokens + rollout.max_new_tokens is {expected.longest} "
            "(a response is sent back whole to be scored or resumed); raise its --context-length or "
            "--max-total-tokens, or lower those settings"
        )
    if expected.deterministic and not facts.deterministic:
        problems.append(
            "it was started without --enable-deterministic-inference and ignores seeds; start it with that option "
            "(rollout.sglang.deterministic: true for megatron-laser serve), or set rollout.sglang.deterministic: false"
        )
    if expected.routing:
        problems += facts.replay_problems
    if facts.preferred_sampling:
        problems.append(
            f"it was started with --preferred-sampling-params {facts.preferred_sampling}, which change what it "
            "samples behind every request, while log-probs stay those of the whole distribution; start it without them"
        )
    vocabulary = found.get("vocab_size", facts.vocab_size)
    if isinstance(vocabulary, int) and vocabulary < expected.vocab_size:
        problems.append(_smaller_vocabulary(expected, f"it has {vocabulary}"))
    return problems + _folder_problems(facts.model_path, found, expected)


def _quantization_problems(facts: ServerFacts, expected: Expected) -> list[str]:
    if facts.weight_version == NO_WEIGHTS and expected.dtype is None:
        return [
            "it was started for the FP8 weights of a run, which has sent none yet; start one without "
            "rollout.sglang.quantization"
        ]
    if expected.dtype is None:  # nobody sends it weights: it may hold them as it likes
        return []
    held = (facts.quantization, facts.weight_blocks if facts.quantization else None)
    wanted = (expected.quantization, (BLOCK, BLOCK) if expected.quantization else None)
    if held == wanted:
        return []
    if expected.quantization is None:
        return [
            f"it holds its weights in {facts.quantization} (--quantization), and a run sends plain ones; start it "
            "without that option, or set rollout.sglang.quantization: fp8 for servers that `megatron-laser serve` "
            "starts so"
        ]
    return [
        f"it holds its weights {_held(facts)}, but rollout.sglang.quantization is {expected.quantization}: the run "
        f"sends FP8 in blocks of {BLOCK} x {BLOCK}; start it with `megatron-laser serve` and that setting, which "
        "gives it --quantization fp8 and --json-model-override-args with a quantization_config of such blocks"
    ]


def _held(facts: ServerFacts) -> str:
    if facts.quantization is None:
        return "as they are"
    blocks = " x ".join(map(str, facts.weight_blocks or ()))
    return f"in {facts.quantization}" + (f" in blocks of {blocks}" if blocks else ", quantized at its start")


def _folder_problems(path: str, folder: Mapping[str, Any], expected: Expected) -> list[str]:
    """What the config.json of a server's model, at `path` on its node, has that the trainer's has not."""
    if not folder:
        return []
    problems = []
    differing = [
        f"{name} {folder.get(name)} instead of {size}"
        for name, size in expected.sizes.items()
        if folder.get(name) != size
    ]
    if differing:  # a bigger or smaller model of the same type
        problems.append(
            f"its model {path} has {', '.join(differing)}; start it with the trainer's model.path"
        )
    # A server with tied embeddings drops the output layer that it is sent; one without keeps its own.
    tied = bool(folder.get("tie_word_embeddings", False))
    if expected.tied not in (None, tied):
        problems.append(
            f"the config.json of its model {path} says tie_word_embeddings {str(tied).lower()}, that of model.path "
            f"{str(expected.tied).lower()}; start it with the trainer's model.path"
        )
    # A server of quantized weights would keep its scales beside the plain weights that a run sends.
    if expected.dtype is not None and folder.get("quantization_config"):
        problems.append(
            f"the config.json of its model {path} has a quantization_config, and a run sends plain weights; start it "
            "with the trainer's model.path"
        )
    return problems


def _smaller_vocabulary(expected: Expected, found: str) -> str:
    return (
        f"its vocabulary is smaller than the {expected.vocab_size} tokens of model.path ({found}); start it with "
        "the trainer's model.path"
    )


class StartupCheck:
    """For `Fleet.wait_until_up`: raises for what is no SGLang server, says at once and then now and again who is late.

    A port at which nobody listens may be a mistake, or a server that starts: only the user knows.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._what = f"waiting up to {seconds:g} s for {count} server{'s' if count != 1 else ''}"
        self._next = 0.0

    def __call__(self, members: Sequence[Member]) -> None:
        refuse_other_servers(members)
        now = time.monotonic()
        errors = [str(member.probe_error) for member in members if member.probe_error is not None]
        if errors and now >= self._next:
            self._next = now + _SAY_EVERY
            logger.warning("%s: %s", self._what, "; ".join(errors))
