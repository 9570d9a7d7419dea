"""The cost of LaSeR: its train step over GRPO's on the same model and the same rollouts.

Both trainers live in one process and take turns, GRPO first in even pairs and LaSeR first in odd ones, so
that a drifting machine speed cancels out. A step is the old-policy pass, the advantages, forward, backward and the
optimizer; generation and grading are outside.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.benchmarks.memory import peak_allocated_bytes
from megatron_laser.config import load_config
from megatron_laser.model import platform
from megatron_laser.trainer import runtime as runtimes
from megatron_laser.trainer.trainer import Trainer
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

_PROMPT_TOKENS = 32
_EOS = 1
_WARM_UP_PAIRS = 3
_CONFIG = """
model: {{path: {model}, dtype: float32, vocab_multiple: 1}}
data: {{train: {model}/unused.jsonl, max_prompt_tokens: 64}}
rollout: {{prompts_per_step: {prompts}, samples_per_prompt: {samples}, max_new_tokens: {response_length}}}
laser: {{enabled: {laser}, score_token: 2, ref_logprob: -20.0, reasoning_warmup_steps: 0,
        self_reward_warmup_steps: 0, std_threshold: 0.0}}
batching: {{tokens_per_micro_batch: {budget}}}
run: {{steps: 1000, output_dir: {model}/run}}
"""


@dataclass(frozen=True)
class StepBenchmarkResult:
    """Seconds are medians; the ratio is LaSeR / GRPO, pair by pair, with a 95 % interval of its median."""

    device: str
    torch: str
    threads: int
    tokens_per_step: int
    pairs: int
    grpo_seconds: float
    laser_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    grpo_peak_bytes: int
    laser_peak_bytes: int

    def table(self) -> str:
        """A table for people."""
        memory = self.laser_peak_bytes / self.grpo_peak_bytes
        return "\n".join(
            [
                f"train step on {self.device}, {self.tokens_per_step} tokens, {self.pairs} interleaved "
                f"pairs, torch {self.torch}, {self.threads} thread(s)",
                f"{'':10s} {'median s':>10s} {'peak MiB':>10s}",
                f"{'GRPO':10s} {self.grpo_seconds:10.4f} {self.grpo_peak_bytes / 2**20:10.2f}",
                f"{'LaSeR':10s} {self.laser_seconds:10.4f} {self.laser_peak_bytes / 2**20:10.2f}",
                f"{'ratio':10s} {self.ratio:10.4f} {memory:10.4f}   (time: 95 % interval "
                f"{self.ratio_low:.4f} to {self.ratio_high:.4f})",
            ]
        )

    def write(self, path: Path) -> None:
        """Write the figures as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


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

    def run(self, pairs: int) -> StepBenchmarkResult:
        """Time `pairs` interleaved pairs after a warm-up."""
        flat = self._rollouts()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.save_model(folder)
            trainers = self._trainers(folder, budget=max(4096, int(flat.lengths.max())))
            steps = {False: 0, True: 0}

            def step(laser: bool) -> None:
                steps[laser] += 1
                trainers[laser].train_step(flat, steps[laser])
                platform.synchronize()

            peaks = {}
            for _ in range(_WARM_UP_PAIRS):
                step(False)
                step(True)
            for laser in (False, True):
                peaks[laser] = peak_allocated_bytes(lambda laser=laser: step(laser))  # type: ignore[misc]
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for pair in range(pairs):
                for laser in (bool(pair % 2), not pair % 2):
                    started = time.perf_counter()
                    step(laser)
                    seconds[laser].append(time.perf_counter() - started)
            runtimes.stop()
        ratios = [b / a for a, b in zip(seconds[False], seconds[True])]
        low, high = _median_interval(ratios)
        return StepBenchmarkResult(
            device=platform.device_name(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            tokens_per_step=int(flat.lengths.sum()),
            pairs=pairs,
            grpo_seconds=statistics.median(seconds[False]),
            laser_seconds=statistics.median(seconds[True]),
            ratio=statistics.median(ratios),
            ratio_low=low,
            ratio_high=high,
            grpo_peak_bytes=peaks[False],
            laser_peak_bytes=peaks[True],
        )

    def save_model(self, folder: Path) -> None:
        """Write the random model as a Hugging Face folder."""
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(self._model, dtype=torch.float32).save_pretrained(folder)

    def _trainers(self, folder: Path, budget: int) -> dict[bool, Trainer]:
        configs = {}
        for laser in (False, True):
            file = folder / f"laser-{laser}.yaml"
            text = _CONFIG.format(model=folder, laser=str(laser).lower(), budget=budget, **self._shape)
            file.write_text(text, encoding="utf-8")
            configs[laser] = load_config(file)
        runtime = runtimes.start(configs[True])
        return {laser: Trainer(config, runtime, score_token_id=2) for laser, config in configs.items()}

    def _rollouts(self) -> FlatBatch:
        rng = np.random.default_rng(0)
        length = self._shape["response_length"]
        batch = RolloutBatch(step=1, weight_version=0)
        for row in range(self._shape["prompts"]):
            prompt = rng.integers(3, self._model.vocab_size, _PROMPT_TOKENS).tolist()
            group = Group(Prompt(row, "", "", prompt), [])
            for sample in range(self._shape["samples"]):
                ids = [*rng.integers(3, self._model.vocab_size, length - 1).tolist(), _EOS]
                generation = Generation(ids, [-9.0] * length, "stop", 0)
                group.samples.append(Sample(prompt, generation, "", True, float(sample % 2), "correct"))
            batch.groups.append(group)
        return flatten(batch)


def _median_interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.array(values), (resamples, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)
