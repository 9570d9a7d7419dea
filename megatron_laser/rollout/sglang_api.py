"""SGLang's HTTP API: every path, request and answer that this package relies on. Nothing else names them.

As read and measured in SGLang 0.5.23 (`sglang/srt/entrypoints/http_server.py`, `managers/io_struct.py`) and
sglang-router 0.3.2. Pure functions between our types and JSON; a body that differs is a fault of the server, never a
guess. The options that servers are started with are in `config/server_options.py` and `rollout/servers/command.py`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laser.rollout.answer_arrays import TokenLogprobs, as_float32
from megatron_laser.types import FinishReason, SamplingParams

MIN_SGLANG = (0, 5, 23)
"""Weight-update sessions (`BEGIN_WEIGHT_UPDATE`) and spans of weight versions are as of this release."""

GENERATE = "/generate"
ABORT_REQUEST = "/abort_request"
# What a server is and holds: the first goes through its scheduler, the other two its HTTP process answers by itself.
SERVER_INFO = "/server_info"
MODEL_INFO = "/model_info"
READY = "/ready"
LOADS = "/v1/loads?include=core"  # see `server_load.py`
FREEZE_GC = "/freeze_gc"
# Weights and memory change only while generation is paused and the cache is flushed.
PAUSE_GENERATION = "/pause_generation"
CONTINUE_GENERATION = "/continue_generation"
FLUSH_CACHE = "/flush_cache"
BEGIN_WEIGHT_UPDATE = "/begin_weight_update"
END_WEIGHT_UPDATE = "/end_weight_update"
UPDATE_WEIGHTS_FROM_DISK = "/update_weights_from_disk"
UPDATE_WEIGHTS_FROM_TENSOR = "/update_weights_from_tensor"
UPDATE_WEIGHTS_FROM_DISTRIBUTED = "/update_weights_from_distributed"
INIT_WEIGHTS_UPDATE_GROUP = "/init_weights_update_group"
DESTROY_WEIGHTS_UPDATE_GROUP = "/destroy_weights_update_group"
WEIGHTS_CHECKER = "/weights_checker"
RELEASE_MEMORY_OCCUPATION = "/release_memory_occupation"
RESUME_MEMORY_OCCUPATION = "/resume_memory_occupation"
ROUTER_WORKERS = "/workers"

NO_WEIGHTS = "not-sent-yet"  # weight version of a server that cannot load the weights of its model folder

PROSE = (FLUSH_CACHE,)  # answer with text that is not JSON
MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")  # what a server gives back and takes again
CHECKSUM_BODY = {"action": "checksum"}  # of `WEIGHTS_CHECKER`

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class WireError(ValueError):
    """A body that is no answer to the request."""


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """One finished request.

    Attributes:
        ids: [tokens] int32, the generated token ids, the stop token included.
        logprobs: [tokens] float32, one for each of `ids`, nats, of logits / temperature.
        finish_reason: `abort` when it was aborted, with what it had by then.
        version: the server's name of the weights at the end of the request.
        versions: the names of all weights that generated a part of it.
        prompt_tokens, cached_tokens: tokens of the input, and how many of them the prefix cache held.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    finish_reason: FinishReason
    version: str
    versions: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ScoreReply:
    """log pi(token | input) in nats of each token; the rest as in `Reply`."""

    logprobs: tuple[float, ...]
    version: str
    prompt_tokens: int
    cached_tokens: int

    @property
    def versions(self) -> tuple[str, ...]:
        """As in `Reply`."""
        return (self.version,)


def generate_body(
    input_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    max_new_tokens: int,
    rid: str,
    place: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """The body of a request for one response.

    Servers with deterministic inference sample by `sampling_seed`, and where it is missing take one and the same for
    every request, so that all responses to a prompt were equal; the others ignore it.

    Args:
        place: (prompt, sample) of the response within its call, for its seed.
    """
    seed = {} if sampling.seed is None else {"sampling_seed": response_seed(sampling.seed, *place)}
    return {
        "input_ids": list(input_ids),
        "rid": rid,
        "return_logprob": True,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({} if sampling.top_k is None else {"top_k": sampling.top_k}),
            **({"min_p": sampling.min_p} if sampling.min_p else {}),
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "skip_special_tokens": False,
            **seed,
        },
    }


def response_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of one response, 0 to 2^63 - 1: another one for each (prompt, sample) of a call and each call's `seed`.

    A server makes a token's random numbers of this seed and the token's position alone.
    """
    digest = hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def score_body(input_ids: Sequence[int], *token_ids: int, rid: str) -> dict[str, Any]:
    """The body of a request for log pi(token | input_ids) of each token at temperature 1: no token is generated.

    After a generation the prefix cache holds all but the last of `input_ids`. The priority counts where the servers'
    option `enable_priority_scheduling` is on: requests without one come after it.
    """
    return {
        "input_ids": list(input_ids),
        "rid": rid,
        "return_logprob": True,
        "token_ids_logprob": list(token_ids),
        "priority": 1,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
    }


def parse_generate(body: Any, vocab_size: int, *, max_new_tokens: int, prompt_tokens: int) -> Reply:
    """The answer to one `generate_body` with an input of `prompt_tokens` ids; `body`: as `read_answer` gives it.

    Raises WireError when `body` is not that.
    """
    meta = _meta(body)
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in _FINISH:
        raise WireError(f"finish_reason {reason!r}")
    ids = _token_ids(body.get("output_ids"), vocab_size)
    stated = meta.get("completion_tokens", len(ids))
    if stated != len(ids) and kind != "abort":  # an aborted request's counts may lag behind its tokens
        raise WireError(f"{len(ids)} output_ids but completion_tokens {stated!r}")
    if len(ids) > max_new_tokens:
        raise WireError(f"{len(ids)} output_ids where at most {max_new_tokens} were asked for")
    if not len(ids) and kind != "abort" and max_new_tokens > 0:
        raise WireError(f"no output_ids, and finish_reason {kind!r}")
    return Reply(
        ids,
        _token_logprobs(meta.get("output_token_logprobs"), ids),
        _FINISH[kind],
        _version(meta),
        (*(span["version"] for span in meta.get("weight_versions") or ()), _version(meta)),
        *_input_tokens(meta, prompt_tokens),
    )


def _token_ids(found: Any, vocab_size: int) -> npt.NDArray[np.int32]:
    if isinstance(found, np.ndarray):
        if not len(found) or 0 <= found.min() <= found.max() < vocab_size:
            return found
        found = found.tolist()
    if not isinstance(found, list) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in found):
        raise WireError(f"output_ids that are not token ids below {vocab_size}: {str(found)[:200]}")
    return np.array(found, np.int32)


def _token_logprobs(entries: Any, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """[tokens], of `[log-prob, id, text]` for each of `ids`."""
    if isinstance(entries, TokenLogprobs):
        narrow = as_float32(entries.logprobs)
        if np.array_equal(entries.ids, ids) and np.isfinite(narrow).all():
            return narrow
        entries = entries.entries()  # what is wrong with them is said below
    entries = [] if entries is None and not len(ids) else entries
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise WireError(
            f"{len(ids)} output_ids but output_token_logprobs {str(entries)[:200]}: expected one for each"
        )
    logprobs = []
    for token, entry in zip(ids.tolist(), entries):
        if entry[1] != token:
            raise WireError(f"output_token_logprobs are of token {entry[1]} where output_ids has {token}")
        logprobs.append(_finite(entry[0], "output_token_logprobs"))
    narrow = as_float32(np.array(logprobs, np.float64))
    if not np.isfinite(narrow).all():
        raise WireError(
            f"output_token_logprobs has {logprobs[int(np.isfinite(narrow).argmin())]!r}: no float32"
        )
    return narrow


def abort_message(body: Any) -> str | None:
    """Why the server itself aborted a request (a bad input); None for one that somebody else aborted."""
    reason = _meta(body).get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort" and reason.get("status_code"):
        return f"{reason['status_code']}: {reason.get('message')}"
    return None


def parse_score(body: Any, *token_ids: int, prompt_tokens: int) -> ScoreReply:
    """The answer to one `score_body` with `prompt_tokens` ids. Raises WireError when `body` is not that."""
    meta = _meta(body)
    try:
        found = {token: logprob for logprob, token, *_ in meta["output_token_ids_logprobs"][0]}
    except (KeyError, IndexError, TypeError, ValueError):
        raise WireError(f"no output_token_ids_logprobs in {str(meta)[:300]}") from None
    if set(found) != set(token_ids):
        raise WireError(f"log-probs of tokens {list(found)} instead of {list(token_ids)}")
    logprobs = tuple(_finite(found[token], "output_token_ids_logprobs") for token in token_ids)
    return ScoreReply(logprobs, _version(meta), *_input_tokens(meta, prompt_tokens))


def _meta(body: Any) -> dict[str, Any]:
    meta = body.get("meta_info") if isinstance(body, dict) else None
    if not isinstance(meta, dict):
        raise WireError(f"no meta_info in {str(body)[:300]}")
    return meta


def _input_tokens(meta: dict[str, Any], sent: int) -> tuple[int, int]:
    """Tokens of the input, and how many of them came from the prefix cache."""
    read = meta.get("prompt_tokens", sent)
    if read != sent:
        raise WireError(f"prompt_tokens {read!r} for an input of {sent} ids: an answer to another request")
    cached = meta.get("cached_tokens", 0)
    return sent, cached if isinstance(cached, int) else 0


def _version(meta: dict[str, Any]) -> str:
    version = meta.get("weight_version")
    if not isinstance(version, str):
        raise WireError(f"weight_version {version!r}: needed to know which weights answered")
    return version


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WireError(f"{name} has {value!r}: expected a number")
    return float(value)


def abort_body(rid: str) -> dict[str, Any]:
    """The body that ends one request."""
    return {"rid": rid, "abort_all": False}


def pause_body(*, keep_requests: bool = False) -> dict[str, Any]:
    """The body that pauses generation. `keep_requests`: what runs goes on afterwards; else it is aborted."""
    return {"mode": "in_place" if keep_requests else "abort"}


def continue_body(*, empty_cache: bool = False) -> dict[str, Any]:
    """The body that ends a pause. `empty_cache`: torch gives the memory back that it keeps for later."""
    return {"torch_empty_cache": True} if empty_cache else {}


def from_disk_body(folder: str, label: str) -> dict[str, Any]:
    """The body of an update from the Hugging Face folder `folder`, whose weights are called `label` from then on."""
    return {"model_path": folder, "weight_version": label, "flush_cache": True}


def from_tensor_body(handles: Sequence[str], *, label: str | None) -> dict[str, Any]:
    """The body of a bucket. `handles`: one for each tensor-parallel rank. `label`: with the last one, else None."""
    return {"serialized_named_tensors": list(handles)} | _with_the_last(label)


def from_distributed_body(
    tensors: Mapping[str, Any], *, group: str, flattened: bool, label: str | None
) -> dict[str, Any]:
    """The body that announces a bucket's broadcasts. `tensors`: their names, dtypes and shapes. `label`: as above."""
    body = {name: tensors[name] for name in ("names", "dtypes", "shapes")} | {"group_name": group}
    return body | _with_the_last(label) | ({"load_format": "flattened_bucket"} if flattened else {})


def _with_the_last(label: str | None) -> dict[str, Any]:
    return {"flush_cache": False} if label is None else {"flush_cache": True, "weight_version": label}


def init_group_body(
    name: str, *, backend: str, address: str, port: int, rank_offset: int, world_size: int
) -> dict[str, Any]:
    """The body of an invitation: a server's first rank is `rank_offset` of the `world_size` of the group."""
    group = {"group_name": name, "world_size": world_size, "backend": backend}
    return group | {"master_address": address, "master_port": port, "rank_offset": rank_offset}


def leave_group_body(name: str) -> dict[str, Any]:
    """The body that has a server leave a group."""
    return {"group_name": name}


def memory_body(tags: Sequence[str]) -> dict[str, Any]:
    """The body that has a server give back, or take again, what `tags` name."""
    return {"tags": list(tags)}


def refusal(answer: Any) -> str | None:
    """Why a control call that was answered with 200 did not succeed; None: it did."""
    failed = isinstance(answer, dict) and answer.get("success") is False
    return str(answer.get("message")) if failed else None


def weight_version(info: Any) -> str | None:
    """The server's name of its weights, in an answer of `MODEL_INFO`; None: it has none."""
    known = isinstance(info, dict) and "weight_version" in info
    return str(info["weight_version"]) if known else None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself."""

    sglang_version: str
    tensor: int
    model_path: str
    weight_version: str
    device: str  # "cpu", "cuda"
    deterministic: bool = False  # whether seeds decide what it samples
    dtype: str | None = None
    longest_input: int | None = None  # tokens
    vocab_size: int | None = None
    model_type: str | None = None
    generates: bool = True
    preferred_sampling: Any = None  # what it does to every request behind its back
    quantization: str | None = None  # see `server_weights.py`, as the next two
    weight_blocks: tuple[int, ...] | None = None
    expert_storage: str = ""  # see `server_weights.py`
    replay_problems: tuple[str, ...] = ()  # why the experts that it reports cannot be used


def server_facts(info: Mapping[str, Any], server: Mapping[str, Any]) -> ServerFacts:
    """From its answers of `MODEL_INFO` and `SERVER_INFO`."""
    longest, vocabulary = server.get("max_req_input_len"), server.get("vocab_size")
    return ServerFacts(
        str(server.get("version", "")),
        int(server.get("tp_size") or 1),
        str(info.get("model_path")),
        weight_version(info) or "",
        str(server.get("device") or "cuda"),
        bool(server.get("enable_deterministic_inference")),
        dtype=str(server.get("dtype")),
        longest_input=longest if isinstance(longest, int) else None,
        vocab_size=vocabulary if isinstance(vocabulary, int) else None,
        model_type=info.get("model_type"),
        generates=bool(info.get("is_generation", True)),
        preferred_sampling=info.get("preferred_sampling_params"),
    )


def parse_version(text: str) -> tuple[int, ...]:
    """ "0.5.23rc1" -> (0, 5, 23); unreadable: ()."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()


def router_workers(reply: Any) -> dict[str, bool] | None:
    """A router's workers in an answer of `ROUTER_WORKERS`: {address: healthy}; None: it is none."""
    workers = reply.get("workers") if isinstance(reply, dict) else None
    if not isinstance(workers, list):
        return None
    return {str(item.get("url")): bool(item.get("is_healthy")) for item in workers}


def add_worker_body(worker: str, api_key: str | None) -> dict[str, Any]:
    """The body that tells a router of a server."""
    return {"url": worker} | ({"api_key": api_key} if api_key is not None else {})
