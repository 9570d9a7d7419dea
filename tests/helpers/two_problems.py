"""A run in which all is well, of two problems and a model with a vocabulary of eight words: to put a fault in."""

import json
from pathlib import Path
from typing import Any

from helpers.models import save_tiny_model, save_word_tokenizer

WORDS = ["<unk>", "<eos>", "what", "is", "1", "2", "+", "<|score|>"]
ROWS = [{"problem": "what is 1 + 1", "answer": "2"}, {"problem": "what is 1", "answer": "1"}]


def save_model(folder: Path) -> Path:
    """The model's folder, with a tokenizer; of type llama, whose tokenizer class takes tokenizer.json as it is."""
    save_tiny_model(folder, "llama3-rope", vocab_size=len(WORDS))
    save_word_tokenizer(folder, WORDS)
    return folder


def write_rows(folder: Path, rows: list[dict[str, str]] = ROWS) -> None:
    """train.jsonl of `settings`."""
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def settings(model: Path) -> dict[str, dict[str, Any]]:
    """Of the run, whose file stands beside train.jsonl."""
    return {
        "model": {"path": str(model), "dtype": "float32", "vocab_multiple": 2},
        "data": {
            "train": "train.jsonl",
            "prompt_suffix": "",
            "apply_chat_template": False,
            "max_prompt_tokens": 8,
        },
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
        "laser": {"score_token": "<|score|>", "ref_logprob": -6.0, "beta": 0.5},
        "batching": {"tokens_per_micro_batch": 64},
        "run": {"steps": 2, "output_dir": "run"},
    }
