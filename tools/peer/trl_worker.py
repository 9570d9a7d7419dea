"""TRL's side: GRPOTrainer on the settings of a JSON file, with a pause between blocks of steps.

    python -m peer.trl_worker SETTINGS.json

Runs in TRL's environment; of megatron_laser it uses the grading function only, which needs no torch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from megatron_laser.rewards import grade_math
from peer.turns import Turns

turns = Turns()


class Pace(TrainerCallback):
    """Waits for the turn before a step, and closes the training phase behind the optimizer step."""

    def __init__(self) -> None:
        self.prepared = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The point between two steps."""
        turns.next_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Behind forward, backward, clipping and the optimizer step."""
        turns.add("train", time.perf_counter() - self.prepared)


class TimedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer that notes where its time goes; it computes nothing differently."""

    pace: Pace

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with turns.phase("generate"):  # tokenization and decoding included
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with turns.phase("grade"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # inside the loss
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with turns.phase("logprob"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super()._prepare_inputs(*args, **kwargs)
        self.pace.prepared = time.perf_counter()
        return inputs


def reward(
    completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
) -> list[float]:
    """The verifier's reward of each completion, by the function that our side uses."""
    rewards = [grade_math(text, gold).reward for text, gold in zip(completions, answer, strict=True)]
    turns.note(
        reward=sum(rewards) / len(rewards),
        response_length=sum(map(len, completion_ids)) / len(completion_ids),
    )
    return rewards


def load_tokenizer(model: str, prompts: list[dict[str, Any]]) -> Any:
    """The folder's tokenizer, as a class that tokenizes the prompts as our side does.

    AutoTokenizer builds Qwen2's own tokenizer for every Qwen2 model, whatever its tokenizer.json says;
    PreTrainedTokenizerFast takes the file as it is.
    """
    texts, wanted = [prompt["text"] for prompt in prompts], [prompt["token_ids"] for prompt in prompts]
    for kind in (PreTrainedTokenizerFast, AutoTokenizer):
        tokenizer = kind.from_pretrained(model, local_files_only=True)
        if tokenizer(text=texts)["input_ids"] == wanted:
            return tokenizer
    raise SystemExit("TRL would tokenize the prompts differently; data.apply_chat_template has to be false")


def main(path: str) -> None:
    """Train on the settings of the JSON file at `path`, in turns."""
    torch.set_num_threads(1)
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    prompts = settings["prompts"]
    tokenizer = load_tokenizer(settings["model"], prompts)
    pace = Pace()
    trainer = TimedGRPOTrainer(
        model=settings["model"],
        reward_funcs=reward,
        args=GRPOConfig(**settings["grpo"]),
        # in our order, prompt by prompt
        train_dataset=Dataset.from_list([{"prompt": p["text"], "answer": p["answer"]} for p in prompts]),
        processing_class=tokenizer,
        callbacks=[pace],
    )
    trainer.pace = pace
    dtypes = {str(parameter.dtype) for parameter in trainer.model.parameters()}
    turns.describe(
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        threads=torch.get_num_threads(),
        dtypes=sorted(dtypes),
        optimizer=str(trainer.args.optim),
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
