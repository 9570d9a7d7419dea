"""The cost of LaSeR: its train step over GRPO's on the same model and the same rollouts.

GRPO and LaSeR both have an old-policy pass, which gives the scores too. The third trainer is LaSeR with scores from the
rollout servers (`laser.score_source: server`) and `policy.old_logprobs: on_policy`: it has no such pass.

The trainers live in one process and take turns, in an order that is turned around from round to round, so that a
drifting machine speed cancels out. A step is the old-policy pass, the advantages, forward, backward and the
optimizer; generation and grading are outside.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Config

from megatron_laser.batching.flat import FlatBatch
from megatron_laser.benchmarks.measure import interleaved_seconds, median_ratio, peak_allocated_bytes
from megatron_laser.benchmarks.random_model import save_random_model
from megatron_laser.benchmarks.random_rollouts import random_rollouts
from megatron_laser.benchmarks.result import Result, aligned, provenance
from megatron_laser.config import load_config
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.model import platform
from megatron_laser.trainer.trainer import Trainer

_PROMPT_TOKENS = 32
_EOS = 1
_WARM_UP_ROUNDS = 3
_CONFIG = """
model: {{path: {model}, dtype: float32, layers: torch, vocab_multiple: 1}}
data: {{train: {model}/unused.jsonl, max_prompt_tokens: 64}}
rollout: {{prompts_per_step: {prompts}, samples_per_prompt: {samples}, max_new_tokens: {response_length}}}
laser: {{enabled: true, score_token: 2, ref_logprob: -20.0, reasoning_warmup_steps: 0,
        self_reward_warmup_steps: 0, std_threshold: 0.0}}
batching: {{tokens_per_micro_batch: {budget}}}
run: {{steps: 1000, output_dir: {model}/run}}
"""


GRPO, LASER, SERVER = "GRPO", "LaSeR", "LaSeR, server scores"
ARMS = {
    GRPO: ["laser.enabled=false"],
    LASER: [],
    SERVER: ["laser.score_source=server", "policy.old_logprobs=on_policy"],
}


@dataclass(frozen=True)
class StepBenchmarkResult(Result):
    """seconds: one figure a round for each trainer, of the same round; peak_bytes: of one step."""

    tokens_per_step: int
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]

    def ratio(self, arm: str, over: str) -> tuple[float, float, float]:
        """Median of arm / over, round by round, and a 95 % interval of that median."""
        return median_ratio(self.seconds[arm], self.seconds[over])

    def table(self) -> str:
        """A table for people."""
        rows = [["", "median s", "over GRPO", "95 % interval", "peak MiB"]]
        for arm in ARMS:
            middle, low, high = self.ratio(arm, GRPO)
            seconds, peak = statistics.median(self.seconds[arm]), self.peak_bytes[arm] / 2**20
            interval = "" if arm == GRPO else f"{low:.4f} to {high:.4f}"
            rows.append([arm, f"{seconds:.4f}", f"{middle:.4f}", interval, f"{peak:.2f}"])
        middle, low, high = self.ratio(SERVER, LASER)
        return "\n".join(
            [
                f"train step on {self.provenance}, {self.tokens_per_step} tokens, {len(self.seconds[GRPO])} "
                "interleaved rounds",
                *aligned(rows),
                f"scores from the server, on-policy, save {1 - middle:.1%} of LaSeR's train step "
                f"[{1 - high:.1%}, {1 - low:.1%}]: the old-policy pass",
            ]
        )


class StepBenchmark:
    """Builds a random Qwen2 model and fixed rollouts, then times both trainers."""

    def __init__(
        self, *, prompts: int, samples: int, response_length: int, hidden: int, layers: int, vocabulary: int
    ) -> None:
        self._shape = dict(prompts=prompts, samples=samples, response_length=response_length)
        self._model = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 32),
            num_key_value_heads=max(1, hidden // 64),
            max_position_embeddings=response_length + 64,
            eos_token_id=_EOS,
        )

    def run(self, rounds: int) -> StepBenchmarkResult:
        """Time `rounds` interleaved rounds after a warm-up."""
        flat = self.rollouts()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.save_model(folder)
            trainers = self._trainers(folder, budget=max(4096, int(flat.lengths.max())))
            steps = dict.fromkeys(ARMS, 0)

            def step(arm: str) -> None:
                steps[arm] += 1
                trainers[arm].train_step(flat, steps[arm])
                platform.synchronize()

            for _ in range(_WARM_UP_ROUNDS):
                for arm in ARMS:
                    step(arm)
            peaks = {arm: peak_allocated_bytes(lambda arm=arm: step(arm)) for arm in ARMS}  # type: ignore[misc]
            seconds = interleaved_seconds(step, tuple(ARMS), rounds=rounds)
            runtimes.stop()
        return StepBenchmarkResult(
            provenance(),
            tokens_per_step=int(flat.lengths.sum()),
            seconds=seconds,
            peak_bytes=peaks,
        )

    def save_model(self, folder: Path) -> None:
        """Write the random model as a Hugging Face folder."""
        save_random_model(folder, self._model)

    def _trainers(self, folder: Path, budget: int) -> dict[str, Trainer]:
        file = folder / "run.yaml"
        file.write_text(_CONFIG.format(model=folder, budget=budget, **self._shape), encoding="utf-8")
        configs = {arm: load_config(file, overrides) for arm, overrides in ARMS.items()}
        runtime = runtimes.start(configs[LASER])
        return {arm: Trainer(config, runtime, score_token_id=2) for arm, config in configs.items()}

    def rollouts(self) -> FlatBatch:
        """Random prompts and responses of the given lengths, all scored, every second one right."""
        return random_rollouts(
            prompts=self._shape["prompts"],
            samples=self._shape["samples"],
            prompt=_PROMPT_TOKENS,
            response=self._shape["response_length"],
            ids=(3, self._model.vocab_size),
            eos=_EOS,
        )
