"""Runs whose memory is planned and measured: a folder with a random model and the run's YAML, and what came of it."""

import json
from pathlib import Path

import yaml
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from helpers.ranks import run_ranks
from megatron_laser.benchmarks.random_model import save_random_model

_COMMAND = Path(__file__).parents[1] / "distributed" / "command_worker.py"
_COMMON = dict(
    num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=2048
)
_SMALL = dict(_COMMON, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
MODELS: dict[str, PretrainedConfig] = {
    "1M, untied": Qwen2Config(**_SMALL, vocab_size=2048, intermediate_size=384),
    "7M, tied": Qwen3Config(
        **_SMALL | dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4),
        vocab_size=8192,
        intermediate_size=768,
        head_dim=32,
        tie_word_embeddings=True,
    ),
    "4M, experts": Qwen3MoeConfig(
        **_SMALL,
        vocab_size=4096,
        intermediate_size=256,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
    ),
    "135M, tied": LlamaConfig(  # SmolLM2-135M's shape
        **_COMMON | dict(num_key_value_heads=3),
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        intermediate_size=1536,
        tie_word_embeddings=True,
    ),
}


def memory_run(folder: Path, model: str) -> Path:
    """Write a run of `model`, of MODELS; its YAML file."""
    save_random_model(folder / "model", MODELS[model])
    sections = {
        "model": dict(path=str(folder / "model"), dtype="float32", layers="torch", vocab_multiple=16),
        "data": dict(train=str(folder / "unused.jsonl"), max_prompt_tokens=16),
        "rollout": dict(prompts_per_step=4, samples_per_prompt=4, max_new_tokens=240),
        "laser": dict(enabled=False),
        # Whole sequences fill it.
        "batching": dict(tokens_per_micro_batch=1024, share_prompts=False),
        "run": dict(steps=10, output_dir=str(folder / "run")),
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def planned_over_measured(
    file: Path, processes: int, *overrides: str, timeout: float = 150.0
) -> dict[tuple[int, str], float]:
    """`bench memory` on gloo ranks: (rank, phase) -> planned over measured bytes at the phase's peak."""
    output = file.with_suffix(".json")
    output.unlink(missing_ok=True)
    run_ranks(_COMMAND, processes, "bench", "memory", file, *overrides, "--output", output, timeout=timeout)
    found = json.loads(output.read_text())
    assert len(found["lines"]) == processes
    ratios = {}
    for rank, lines in enumerate(found["lines"]):
        for phase in ("state", "update", "optimizer step"):
            total = next(line for line in lines if line["phase"] == phase)
            assert total["measured"] > 2**20
            ratios[rank, phase] = total["planned"] / total["measured"]
    return ratios
