"""A whole run that takes seconds: a random model with a tokenizer, sums as data, and its YAML file.

python tests/helpers/tiny_run.py FOLDER        writes it for use by hand
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from helpers.torchrun import worker_environment

# As transformers initialises it: all tokens are about equally likely, so that some responses end and some do not.
AS_INITIALISED = {"scale": 0.02, "vector_scale": 0.0}
TOKENS = ["<pad>", "<eos>", "<|score|>", "<unk>", *map(str, range(20)), "+", "\\boxed{", "}", "?"]


def write_tiny_run(folder: Path, *, family: str = "qwen2", **sections: dict[str, Any]) -> Path:
    """Model, tokenizer, data and run.yaml in `folder`; returns the YAML file. `sections` change its settings.

    family: of `helpers.models.FAMILIES`.
    """
    from helpers.models import save_tiny_model, save_word_tokenizer

    save_word_tokenizer(folder, TOKENS)
    save_tiny_model(
        folder,
        family,
        **AS_INITIALISED,
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=64,
        # SGLang on a CPU pads the rows of experts to a multiple of 32.
        **({"moe_intermediate_size": 32} if family.startswith("qwen3-moe") else {}),
    )
    (folder / "lucky.py").write_text(REWARD)
    rows = [{"problem": f"{i} + {j} ?", "answer": str(i + j)} for i in range(6) for j in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": ".", "dtype": "float32", "vocab_multiple": 1},
        "data": {
            "train": "train.jsonl",
            "prompt_suffix": "",
            "apply_chat_template": False,
            "max_prompt_tokens": 8,
        },
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_new_tokens": 8,
            "deadline": 320,
            "sync_deadline": 54,
        },
        "reward": {"function": "lucky.py:lucky", "workers": 1},
        "laser": {
            "score_token": "<|score|>",
            "ref_logprob": -5.0,
            "beta": 0.5,
            "reasoning_warmup_steps": 1,
            "self_reward_warmup_steps": 1,
        },
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 2, "export_hf": False},
        "evaluation": {"baseline": False},
        "logging": {"tensorboard": False},
        "run": {"steps": 4, "output_dir": "out", "deadline": 60},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


# A random model is right about nothing: a reward that varies inside a group makes the policy loss work.
REWARD = '''
def lucky(response, answer):
    """Right when its characters add up to an odd number."""
    return float(sum(map(ord, response)) % 2)
'''


def metrics_without_times(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for what differs between two equal runs."""
    from megatron_laser.observability.rates import VARYING

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(VARYING)} for line in lines]


def start_run(file: Path, *overrides: str, processes: int = 1, log: Path | None = None) -> subprocess.Popen:
    """`train FILE` as a child process in a session of its own, under torchrun for several ranks."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if log is not None:
            command += ["--log-dir", str(log), "--redirects", "3"]
    command += ["-m", "megatron_laser", "train", str(file), *overrides]
    return subprocess.Popen(
        command,
        env=worker_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, *, seconds: float) -> str:
    """All that the run printed, once it has ended well."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output[-5000:]
    return output


def metric_lines(folder: Path) -> int:
    """How many lines metrics.jsonl has by now."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def end_session(process: subprocess.Popen) -> None:
    """Kill a run and everything that it started."""
    import contextlib
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    print(write_tiny_run(Path(sys.argv[1])))
