#!/usr/bin/env python
"""Does the parallel layout change what is learned? Trains 3 steps on fixed rollouts under many layouts.

    python tools/compare_layouts.py                     # 1, 2 and 4 gloo processes on this machine
    python tools/compare_layouts.py --processes 1 2     # without the 2 x 2 layouts
    python tools/compare_layouts.py --experts           # a model with experts, and
    python tools/compare_layouts.py --uneven            # interleaved pipelines of uneven chunks
    python tools/compare_layouts.py --loss gspo --only "tensor 2" "context 2"   # a policy loss of whole responses

Every layout starts from the same tiny random model and trains on the same rollouts: off-policy old log-probs,
right and wrong scored responses, truncated and one-token ones, some with tokens that an environment wrote, groups of
different sizes, a number of samples that no rank count divides. All loss terms are on: clipping, KL to a reference
model, entropy, readouts of one token, of a pair, of prefixes and behind a forced text, advantages that they change.
Loss terms and gradient norms of each step and a parameter checksum after the last must agree with one process at one
token budget, which packs every sample's prompt (`batching.share_prompts: false`; where a layout allows it, the others
pack a group's once):
|a - b| <= 1e-5 |b| + 2e-7 in fp32, where terms of size 1 cancel. The exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from layouts import EXPERT_LAYOUTS, LAYOUTS, UNEVEN_LAYOUTS  # noqa: E402

STEPS = 3
RELATIVE, ABSOLUTE = 1e-5, 2e-7
ROUTERS = ("router_aux_loss", "router_z_loss", "expert_load_max", "expert_load_entropy", "routing_changed")
COMPARED = (
    *("total_loss", "policy_loss", "self_reward_loss", "kl_loss", "entropy", "grad_norm", "clip_fraction"),
    *("approx_kl", "reference_kl", "logprob_diff_mean", "logprob_diff_max", "advantage_mixed_fraction"),
    *("readout/pair/loss", "readout/prefix/loss", "readout/margin/loss", "readout/forced/loss"),
)
CONFIG = """
model: {{path: {model}, dtype: float32, vocab_multiple: 1}}
data: {{train: {model}/unused.jsonl, max_prompt_tokens: 32}}
rollout: {{prompts_per_step: 8, samples_per_prompt: 4, max_new_tokens: 45, temperature: 0.8}}
laser: {{score_token: 89, ref_logprob: -6.0, beta: 0.4, alpha: 0.5, tau: 0.3, std_threshold: 0.001,
        reasoning_warmup_steps: 0, self_reward_warmup_steps: 0, readouts: [{{}},
        {{name: pair, tokens: [88, 87], position: before_eos, score: pair_sigmoid, loss: bce,
          target: {{group_shrunk: 0.7}}, advantages: discrepancy}},
        {{name: prefix, tokens: [88, 87, 86], position: {{every: 7}}, score: normalised, loss: brier,
          target: prefix_value, weight: 0.2}},
        {{name: margin, tokens: 86, loss: margin, weight: 0.2}},
        {{name: forced, tokens: 85, position: {{forced: w5 w6 w1}}, target: {{group_shrunk: 0.7}}, weight: 0.2}}]}}
policy: {{old_logprobs: {old}, loss: {loss}, kl_coefficient: 0.05, entropy_coefficient: 0.01{more}}}
optimizer: {{lr: 1.0e-3}}
{moe}
run: {{steps: {steps}, output_dir: {model}/run, deadline: 120}}
"""
#: Of `policy`, for the clipped surrogate and for losses of whole responses.
PPO = {"old": "rollout", "more": ", dual_clip: 3.0"}
WHOLE = {
    "old": "recompute",
    "more": ", loss_aggregation: sequence_mean_token_mean, epochs: 2, importance_level: sequence, importance_cap: 2.0",
}
MOE = "moe: {aux_loss_coefficient: 0.05, z_loss_coefficient: 0.01, routing_replay: true}"


def layouts_of(*, experts: bool, uneven: bool) -> dict[int, dict[str, list[str]]]:
    """The layouts of the model that the command line chose."""
    return UNEVEN_LAYOUTS if uneven else EXPERT_LAYOUTS if experts else LAYOUTS


def settings(model: Path, *, experts: bool = False, loss: str = "ppo") -> str:
    """The YAML of one process that all layouts change."""
    policy = PPO if loss == "ppo" else WHOLE
    return CONFIG.format(model=model, steps=STEPS, moe=MOE if experts else "", loss=loss, **policy)


def make_model(folder: Path, tied: bool, experts: bool = False, layers: int = 4) -> None:
    """A tiny random Qwen2, or Qwen3-MoE, whose sizes 2 x 2 layouts divide, and a tokenizer of the words w0, w1, .."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen2Config, Qwen3MoeConfig

    from megatron_laser.benchmarks.random_model import save_random_model

    sizes = dict(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
    )
    mixture = dict(
        head_dim=8, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    )
    config = Qwen3MoeConfig(**sizes, **mixture) if experts else Qwen2Config(**sizes)
    save_random_model(folder, config, spread=0.1, vector_spread=0.2)
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(90)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))


def fixed_rollouts(step: int, experts: bool = False):
    """A hand-shaped rollout batch, the same in every process; with experts, where the engine sent most tokens."""
    import numpy as np

    from megatron_laser.batching.flat import flatten
    from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample

    rng, routing = np.random.default_rng(step), np.random.default_rng(step + 100)
    batch = RolloutBatch(step=step, weight_version=step - 1)
    beginning = [int(x) for x in rng.integers(2, 89, 18)]  # of all prompts, as a system prompt is
    for row, size in enumerate((4, 4, 3, 4, 4, 2, 4, 4)):
        prompt = [*beginning, *(int(x) for x in rng.integers(2, 89, rng.integers(3, 12)))]
        group = Group(Prompt(row, "", "", prompt), [])
        for number in range(size):
            length = 1 if (row, number) == (1, 2) else int(rng.integers(2, 40))
            truncated = (row + number) % 5 == 4
            ids = [int(x) for x in rng.integers(2, 89, length)]
            if not truncated:
                ids[-1] = 1
            logprobs = [float(x) for x in rng.normal(-4.5, 0.5, length)]
            generation = Generation(ids, logprobs, "length" if truncated else "stop", step - 1)
            if (row + number) % 3 == 1 and length > 8:
                generation.sampled = np.array([not 3 <= t % 8 < 6 for t in range(length - 1)] + [True])
            if experts and (row + number) % 4:
                # the best two of eight random numbers, for each of four layers
                tokens = len(prompt) + length - 1
                chosen = routing.random((tokens, 4, 8)).argsort(axis=-1)[..., :2]
                generation.routed_experts = chosen.astype(np.uint8)
            reward = 0.0 if truncated else float(rng.random() < 0.5)
            group.samples.append(
                Sample(
                    prompt,
                    generation,
                    "",
                    generation.is_scored((1,)),
                    reward,
                    "correct" if reward else "wrong",
                )
            )
        batch.groups.append(group)
    return flatten(batch)


def run_worker(model: Path, output: Path, *, experts: bool, uneven: bool, only: list[str]) -> None:
    """Inside torchrun: train under each layout in turn; rank 0 writes the figures."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_laser.config import load_config
    from megatron_laser.distributed import runtime as runtimes
    from megatron_laser.trainer.trainer import Trainer

    torch.set_num_threads(1)
    known = layouts_of(experts=experts, uneven=uneven)
    layouts = known[int(os.environ.get("WORLD_SIZE", "1"))]
    reference = next(iter(known[1]))
    runtime = None
    store = None
    results = {}
    for name in dict.fromkeys([reference, *only]) if only else layouts:
        if name not in layouts:
            continue
        config = load_config(model / "config.yaml", layouts[name])
        if runtime is None:
            runtime = runtimes.start(config)
            store = runtime.store
        else:
            parallel_state.destroy_model_parallel()
            runtime = runtimes.build_groups(config, store)
        trainer = Trainer(config, runtime, score_token_id=89)
        figures = []
        for step in range(1, STEPS + 1):
            metrics = trainer.train_step(fixed_rollouts(step, experts), step).metrics
            figures.append({key: metrics[key] for key in (*COMPARED, *(ROUTERS if experts else ()))})
        checksum = sum(float(tensor.double().abs().sum()) for _, tensor in trainer.weight_stream())
        signed = sum(
            float(
                (tensor.double().flatten() * torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64)).sum()
            )
            for _, tensor in trainer.weight_stream()
        )
        results[name] = {"steps": figures, "checksum": checksum, "signed_checksum": signed}
        dist.barrier()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    runtimes.stop()


def launch(
    model: Path, processes: int, output: Path, *, experts: bool, uneven: bool, only: list[str]
) -> dict:
    """Run the worker on so many processes; returns what it wrote."""
    arguments = ["--worker", str(model), "--output", str(output)]
    arguments += ["--experts"] * experts + ["--uneven"] * uneven
    arguments += ["--only", *only] if only else []
    start(arguments, processes)
    return json.loads(output.read_text())


def start(arguments: list[str], processes: int) -> None:
    """Run this file with `arguments`, under torchrun when there is more than one process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*command, __file__, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode != 0:
        raise SystemExit(f"{processes} processes failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def worst_ratio(result: dict, reference: dict) -> tuple[float, str]:
    """Largest |a - b| / (1e-5 |b| + 2e-7) and where it is; at most 1 is agreement."""
    pairs = [(result[name], reference[name], name) for name in ("checksum", "signed_checksum")] + [
        (mine[key], theirs[key], f"{key}, step {step}")
        for step, (mine, theirs) in enumerate(zip(result["steps"], reference["steps"], strict=True), 1)
        for key in theirs
    ]
    return max((abs(a - b) / (RELATIVE * abs(b) + ABSOLUTE), where) for a, b, where in pairs)


def main() -> None:
    """Parse the command line, run all layouts, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        choices=sorted(LAYOUTS),
        help="gloo processes whose layouts are run; default: 1 2 4",
    )
    parser.add_argument("--tied", action="store_true", help="a model with tied embeddings")
    parser.add_argument(
        "--experts", action="store_true", help="a model with experts, under layouts of its own"
    )
    parser.add_argument(
        "--uneven",
        action="store_true",
        help="a model of six layers, under interleaved pipelines of uneven chunks (1 and 2 processes)",
    )
    parser.add_argument(
        "--loss",
        default="ppo",
        choices=("ppo", "gspo", "gmpo", "cispo", "sapo"),
        help="policy.loss; other than ppo: two epochs, with importance weights of whole responses",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="LAYOUT", help="only these, beside the reference"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        run_worker(
            arguments.worker,
            arguments.output,
            experts=arguments.experts,
            uneven=arguments.uneven,
            only=arguments.only,
        )
        return
    known = layouts_of(experts=arguments.experts, uneven=arguments.uneven)
    names = [name for layouts in known.values() for name in layouts]
    if unknown := [name for name in arguments.only if name not in names]:
        parser.error(f"--only: no layout is called {unknown[0]!r}; there are: {'; '.join(names)}")
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch)
        make_model(model, arguments.tied, arguments.experts, layers=6 if arguments.uneven else 4)
        (model / "config.yaml").write_text(settings(model, experts=arguments.experts, loss=arguments.loss))
        results: dict[str, dict] = {}
        for processes in sorted({1, *arguments.processes} & set(known)):
            if processes > 1 and arguments.only and not known[processes].keys() & set(arguments.only):
                continue
            results |= launch(
                model,
                processes,
                model / f"results-{processes}.json",
                experts=arguments.experts,
                uneven=arguments.uneven,
                only=arguments.only,
            )
    reference_name = next(iter(results))
    reference = results[reference_name]
    header = (
        f"{'layout':42s} {'loss step 1':>13s} {'grad norm 3':>13s} {'self-reward 3':>13s} {'checksum':>15s}"
    )
    print(f"{header} {'worst':>8s}  where")
    failed = False
    for name, result in results.items():
        ratio, where = worst_ratio(result, reference)
        failed |= ratio > 1.0
        first, last = result["steps"][0], result["steps"][-1]
        print(
            f"{name:42s} {first['total_loss']:13.8f} {last['grad_norm']:13.8f} {last['self_reward_loss']:13.8f} "
            f"{result['checksum']:15.7f} {ratio:8.4f}  {'reference' if result is reference else where}"
        )
    print(f"\nworst = largest |a - b| / (1e-5 |b| + 2e-7) against '{reference_name}'; at most 1 agrees")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
