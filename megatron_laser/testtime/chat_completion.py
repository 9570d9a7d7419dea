"""An answer in the shapes that OpenAI clients read: one object, or server-sent events.

Source: OpenAI API reference, "Chat completion object" and "Chat completion chunk object".
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from megatron_laser.testtime.answering import Answer
from megatron_laser.testtime.chat_request import ChatRequest


def completion(model_name: str, chat: ChatRequest, result: Answer) -> dict[str, Any]:
    """OpenAI's `chat.completion`, with the score in the choice and the vote in `laser`."""
    chosen = result.samples[result.choice.index]
    samples = [
        {
            "content": sample.text,
            "response_ids": sample.response_ids,
            "finish_reason": "stop" if sample.finished else "length",
            "score": sample.score,
            "answer": sample.answer,
            "answer_class": number,
        }
        for sample, number in zip(result.samples, result.choice.classes, strict=True)
    ]
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model_name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": chosen.text, "refusal": None},
                "finish_reason": "stop" if chosen.finished else "length",
                "logprobs": None,
                "score": chosen.score,
            }
        ],
        "usage": {
            "prompt_tokens": len(chat.prompt_ids),
            "completion_tokens": result.tokens,
            "total_tokens": len(chat.prompt_ids) + result.tokens,
        },
        "laser": {
            "k": chat.k,
            "score": chosen.score,
            "method": result.choice.method,
            "answer": result.choice.answer,
            "vote_share": result.choice.share,
            "chosen": result.choice.index,
            "samples": samples if chat.return_samples else None,
        },
    }


def stream_events(whole: dict[str, Any], *, with_usage: bool) -> Iterator[bytes]:
    """What `completion` gave as events: the answer in one piece with its score, why it ended, [DONE].

    Args:
        with_usage: a last chunk without choices has the numbers of tokens (`stream_options.include_usage`).
    """
    head = {name: whole[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    (choice,) = whole["choices"]
    delta = {"role": "assistant", "content": choice["message"]["content"]}
    said = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": None, "score": choice["score"]}
    ended = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"], "logprobs": None}
    chunks = [{"choices": [said], "laser": whole["laser"]}, {"choices": [ended]}]
    if with_usage:
        chunks = [chunk | {"usage": None} for chunk in chunks] + [{"choices": [], "usage": whole["usage"]}]
    for chunk in chunks:
        yield b"data: " + json.dumps(head | chunk).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
