"""A chat request of an OpenAI client, checked: everything that cannot be done is refused, nothing ignored in silence
that would change the answer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_laser.data import NO_OPTIONS, ChatOptions
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.testtime.prompts import check_messages, prompt_token_ids
from megatron_laser.testtime.voting import VOTES

# What would change the answer and is not done here; refused unless it asks for what happens anyway.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "stop": ([], "", None),
    "tools": ([], None),
    "functions": ([], None),
    "tool_choice": ("none", "auto", None),
    "function_call": ("none", "auto", None),
    "modalities": (["text"], None),
    "response_format": ({"type": "text"}, None),
    "logit_bias": ({}, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
}
# What no answer depends on here.
_HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
)
_READ = (
    *("model", "messages", "k", "vote", "return_samples", "temperature", "top_p", "seed"),
    *("max_tokens", "max_completion_tokens", "stream", "stream_options"),
)
_HINTS = {"n": "; one answer is returned: `k` is the number that is sampled"}


class RequestError(Exception):
    """An HTTP error: status, message, the parameter at fault, and OpenAI's code for it."""

    def __init__(self, status: int, message: str, parameter: str | None, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter
        self.code = code


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request. `k`: answers to sample. `vote`: see `testtime.voting`.

    stream: the answer as server-sent events. stream_usage: with a last one that counts tokens.
    """

    model: str
    prompt_ids: list[int]
    k: int
    vote: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    return_samples: bool
    stream: bool
    stream_usage: bool


def parse_chat_request(
    body: Any,
    model: ModelFolder,
    *,
    default_k: int,
    max_k: int,
    max_new_tokens: int,
    apply_chat_template: bool,
    prompt_suffix: str,
    options: ChatOptions = NO_OPTIONS,
) -> ChatRequest:
    """Check a request's body; `k`, `vote` and `return_samples` are this proxy's own fields.

    Raises:
        RequestError: status 400, naming the parameter and what was expected.
    """
    if not isinstance(body, Mapping):
        raise RequestError(400, "expected a JSON object", None, "invalid_type")
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise _refused("model", "required: the served model's name")
    for parameter, allowed in _UNSUPPORTED.items():
        if parameter in body and body[parameter] not in allowed:
            raise _refused(
                parameter,
                f"{body[parameter]!r:.80} is not supported{_HINTS.get(parameter, '')}",
                "unsupported_parameter",
            )
    for parameter in body:
        if parameter not in (*_READ, *_UNSUPPORTED, *_HARMLESS) and body[parameter] is not None:
            raise _refused(f"{parameter:.80}", f"unknown{_nearest(parameter)}", "unknown_parameter")
    if "messages" not in body:
        raise _refused("messages", "required and not given")
    try:
        prompt_ids = prompt_token_ids(
            {"messages": body["messages"]},
            model.tokenizer,
            apply_chat_template=apply_chat_template,
            prompt_suffix=prompt_suffix,
            options=options,
        )
    except TestTimeError as error:
        raise RequestError(400, str(error), "messages", "invalid_value") from None
    if not prompt_ids or min(prompt_ids) < 0 or max(prompt_ids) >= model.vocab_size:
        raise _refused("messages", "they have no tokens, or one outside the model's vocabulary")
    for read in model.readout_tokens:
        if read.token.id in prompt_ids:
            where = _where(body["messages"], model, read.token.id)
            raise _refused(
                "messages", f"{where} holds {read.words}, which stands for the model's own judgement"
            )
    room = model.max_positions - len(prompt_ids) - 1
    if room < 1:
        raise _refused(
            "messages",
            f"{len(prompt_ids)} tokens leave no room for an answer; the model reads {model.max_positions}",
            "context_length_exceeded",
        )
    vote = body.get("vote", "weighted_majority")
    if vote not in VOTES:
        raise _refused("vote", f"expected {', '.join(VOTES)}, got {vote!r:.80}")
    stream = _flag(body, "stream")
    stream_options = body.get("stream_options")
    if stream_options is not None and not (stream and isinstance(stream_options, Mapping)):
        raise _refused("stream_options", "expected an object, and only with `stream`: true")
    most = _integer(body, "max_completion_tokens", None, 1, None) or _integer(
        body, "max_tokens", None, 1, None
    )
    return ChatRequest(
        model=name,
        prompt_ids=prompt_ids,
        k=_integer(body, "k", default_k, 1, max_k) or default_k,
        vote=vote,
        max_new_tokens=min(most or max_new_tokens, max_new_tokens, room),
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        seed=_integer(body, "seed", None, 0, 2**63 - 1),
        return_samples=_flag(body, "return_samples"),
        stream=stream,
        stream_usage=_flag(stream_options or {}, "include_usage"),
    )


def _where(messages: Any, model: ModelFolder, token_id: int) -> str:
    """What brings a token into the prompt."""
    for index, message in enumerate(check_messages(messages)):
        if token_id in model.tokenizer(message["content"], add_special_tokens=False)["input_ids"]:
            return f"messages[{index}]"
    return "the chat template, system prompt or prompt suffix"


def _integer(
    body: Mapping[str, Any], name: str, default: int | None, low: int, high: int | None
) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    inside = type(value) is int and value >= low and (high is None or value <= high)
    if not inside:
        raise _refused(
            name,
            f"expected an integer of {low} or more{f', at most {high}' if high else ''}, got {value!r:.80}",
        )
    return int(value)


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _refused(name, f"expected a number from {low:g} to {high:g}, got {value!r:.80}")
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise _refused(name, f"expected true or false, got {value!r:.80}")
    return bool(value)


def _nearest(parameter: str) -> str:
    close = difflib.get_close_matches(parameter, _READ, 1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _refused(parameter: str, reason: str, code: str = "invalid_value") -> RequestError:
    return RequestError(400, f"`{parameter}`: {reason}", parameter, code)
