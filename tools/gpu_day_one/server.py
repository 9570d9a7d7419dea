"""Stage `server`: an SGLang server on the GPU with torch's attention, or exactly why there is none."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import sys
import venv
from pathlib import Path

import torch

from gpu_day_one.stage import TORCH_LAYERS, Stage

_ROOT = Path(__file__).resolve().parents[2]
_STAND_INS = _ROOT / "tools" / "sglang_cpu" / "stand_ins"
# SGLang's own CUDA kernels, hundreds of MB and built for one torch: what is missing is named.
_KERNELS = ("sgl_kernel", "flashinfer")
_OPTIONS = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
}


def run(stage: Stage) -> None:
    """Start `serve` on a toy model, ask for one response, compare its log-probs with transformers'."""
    missing = [name for name in _KERNELS if importlib.util.find_spec(name) is None]
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        stage.note(
            "server", needs="the package sglang: tools/pack_gpu_wheels.sh packs it, --wheels installs it"
        )
        return
    if stage.rehearse or not torch.cuda.is_available():
        stage.note(
            "server",
            sglang=version,
            missing=missing,
            needs="a CUDA device; on a CPU tests/servers run real servers",
        )
        return
    from helpers.sglang_server import call
    from helpers.tiny_run import write_tiny_run

    from megatron_laser.config import load_config
    from megatron_laser.rollout.servers import ServeError, ServeProcess

    folder = stage.work / "server"
    file = write_tiny_run(folder)
    python = _environment(stage.work / "sglang", missing)
    options = ", ".join(f"{name}: {str(value).lower()}" for name, value in _OPTIONS.items())
    overrides = [
        TORCH_LAYERS,
        "rollout.engine=sglang",
        f"rollout.sglang={{python: {python}, device: cuda, start_deadline: 90, options: {{{options}}}}}",
        f"run.output_dir={stage.work / 'server_run'}",
    ]
    process = None
    try:
        process = ServeProcess(load_config(file, overrides), stage.work / "serve")
        endpoints = process.wait_ready(90)
        body = {
            "input_ids": [4, 24, 5, 27],
            "return_logprob": True,
            "sampling_params": {"max_new_tokens": 6, "temperature": 1.0},
        }
        key = os.environ.get("MEGATRON_LASER_API_KEY")
        answer = call(endpoints.servers[0].url, "/generate", body, api_key=key)
        ids = [int(one[1]) for one in answer["meta_info"]["output_token_logprobs"]]
        given = [float(one[0]) for one in answer["meta_info"]["output_token_logprobs"]]
        error = _largest_error(folder, body["input_ids"], ids, given)
        stage.note(
            "server", sglang=version, missing=missing, runs=True, tokens=len(ids), largest_error_nats=error
        )
        if not error < 0.05:
            raise SystemExit(f"the server's log-probs are off by {error} nats")
    except (ServeError, OSError, ValueError, KeyError) as error:
        # Not a fault of this project: without SGLang's CUDA kernels it can only be tried.
        words = process.last_words(15) if process is not None else []
        stage.note("server", sglang=version, missing=missing, runs=False, why=str(error)[-1200:], log=words)
    finally:
        if process is not None:
            process.stop()


def _environment(folder: Path, missing: list[str]) -> Path:
    """An interpreter that sees what this one does, and a stand-in for sgl_kernel that fails loudly when called.

    Servers are started without PYTHONPATH, so the paths stand in the environment's own .pth file.
    """
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    paths = [path for path in sys.path if path.endswith(("site", "site-packages", "dist-packages"))]
    if "sgl_kernel" in missing:
        link = folder / "stand_ins"
        link.mkdir(exist_ok=True)
        if not (link / "sgl_kernel").exists():
            (link / "sgl_kernel").symlink_to(_STAND_INS / "sgl_kernel")
        paths.append(str(link))
    (packages / "day_one.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


@torch.no_grad()
def _largest_error(folder: Path, prompt: list[int], ids: list[int], given: list[float]) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    log_p = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    expected = [float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
    return max((abs(a - b) for a, b in zip(expected, given, strict=True)), default=math.nan)
