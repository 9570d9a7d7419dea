"""A made-up run in the formats of a real one: metrics, dumps of rollouts with tokens, timeline, events, checkpoints.

python tests/helpers/synthetic_run.py FOLDER [STEPS] [RESPONSES]        writes it for use by hand (seconds)
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

GROUP = 8
SOURCES = ("deepmath", "aime")
_TEXT = (
    "we have the sum of both sides so that follows from an even number which gives us and then let be it is clear "
    "therefore consider case where since prime divides product factor remaining terms cancel hence"
)
_WORDS = _TEXT.split()
_MATHS = (r"$x^2 + 1$", r"\(a_n = 2^n\)", r"$\frac{1}{2}$", r"$\sum_{k=1}^{n} k$", "=", "+", "7", "12")
_START = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
_STEP_SECONDS = 60.0


def write_synthetic_run(
    folder: Path,
    *,
    steps: int = 1000,
    responses: int = 10_000,
    tokens: bool = True,
    mean_length: int = 200,
    name: str = "synthetic",
    seed: int = 0,
    lr: float = 1e-6,
    total_steps: int | None = None,
    finished: bool = True,
    old_format: bool = False,
) -> Path:
    """Write the run and return its folder.

    Args:
        responses: of all dumps together, about 200 a dump; a multiple of 8. mean_length: tokens of a response.
        total_steps: `run.steps`; by default `steps`. old_format: without timeline.jsonl and events.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = steps if total_steps is None else total_steps
    (folder / "config.yaml").write_text(yaml.safe_dump(_settings(folder, name, total, lr), sort_keys=False))
    (folder / "run.json").write_text(json.dumps({"id": f"{name}-{seed}", "name": name, "started": _time(0)}))
    rng = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("wb") as file:
        for step in range(1, steps + 1):
            file.write(metrics_line(step, rng))
    dumps = max(1, min(steps, responses // 200)) if responses else 0
    for number in range(dumps):
        step = (number + 1) * steps // dumps
        groups = responses // GROUP * (number + 1) // dumps - responses // GROUP * number // dumps
        write_dump(folder, step, groups, rng, tokens=tokens, mean_length=mean_length)
    if not old_format:
        write_timeline(folder, range(1, steps + 1, max(1, steps // 200)))
        write_events(folder, steps)
    for step in sorted({max(1, steps // 2), steps}):
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    if finished:
        (folder / "FINISHED").write_text(json.dumps({"step": steps}))
    return folder


def metrics_line(step: int, rng: np.random.Generator) -> bytes:
    """One line of metrics.jsonl."""
    progress = 1 - np.exp(-step / 300)
    noise = rng.normal(size=12)
    accuracy = float(np.clip(0.25 + 0.45 * progress + 0.03 * noise[0], 0, 1))
    auroc = float(np.clip(0.5 + 0.4 * progress + 0.02 * noise[1], 0, 1))
    generate, train, logprob, sync = 30 + noise[2], 20 + noise[3], 6 + 0.2 * noise[4], 2.0
    row: dict[str, Any] = {
        "step": step,
        "reward_mean": accuracy,
        "reward_std": float(np.sqrt(accuracy * (1 - accuracy))),
        "response_length_mean": 180 + 60 * progress + 5 * noise[5],
        "truncated_fraction": float(np.clip(0.02 + 0.01 * noise[6], 0, 1)),
        "scored_fraction": 0.97,
        "accuracy_tried": accuracy,
        "self_reward_auroc": auroc,
        "self_reward_f1": float(np.clip(0.3 + 0.5 * progress + 0.02 * noise[7], 0, 1)),
        "score_right_mean": 0.2 + 0.7 * progress,
        "score_wrong_mean": 0.2 * progress,
        "score_quantiles_right": [0.1, 0.3, 0.5, 0.8, 1.0],
        "policy_loss": 0.01 * noise[8],
        "self_reward_loss": 0.3 * float(np.exp(-step / 200)) + 0.05,
        "entropy": 0.6 * float(np.exp(-step / 500)) + 0.1,
        "grad_norm": 0.5 + 0.05 * noise[9] ** 2,
        "lr": 1e-6,
        "bad_steps": 0.0,
        "logprob_diff_mean": 1e-3 + 1e-4 * noise[10] ** 2,
        "time/generate": generate,
        "time/grade": 0.5,
        "time/logprob": logprob,
        "time/train": train,
        "time/sync": sync,
        "time/total": generate + train + logprob + sync,
        "tokens": 40_000,
        "rate/tokens_per_second_gpu": 5000 + 50 * noise[11],
        "mfu/train": 0.38,
    }
    if step % 50 == 0:
        row |= {"eval/accuracy": accuracy - 0.02, "eval/self_reward_auroc": auroc, "eval/nothing": None}
    return (
        orjson.dumps({key: float(v) if isinstance(v, np.floating) else v for key, v in row.items()}) + b"\n"
    )


def write_dump(
    folder: Path,
    step: int,
    groups: int,
    rng: np.random.Generator,
    *,
    tokens: bool = True,
    mean_length: int = 200,
) -> None:
    """`rollouts/step_<step>.jsonl`: so many groups of 8 responses; the last of every 40th group is not graded."""
    lines: list[bytes] = []
    progress = 1 - np.exp(-step / 300)
    for group in range(groups):
        row = int(rng.integers(0, 5000))
        right_answer = str(int(rng.integers(2, 200)))
        chance = float(rng.beta(2, 2)) * (0.5 + 0.5 * progress)
        source = SOURCES[int(row % 7 == 0)]
        for sample in range(GROUP):
            graded = not (group % 40 == 39 and sample == GROUP - 1)
            record = _response(rng, right_answer, chance, progress, mean_length, graded, tokens)
            lines.append(
                orjson.dumps(
                    {
                        "step": step,
                        "row": row,
                        "source": source,
                        "sample": sample,
                        "epoch": 0,
                        "problem": rf"Let $n = {row}$. Find $\sqrt{{{row}^2}}$ modulo ${right_answer}$, if $n > 1$.",
                        "answer": right_answer,
                        **record,
                        "weight_version": step - 1,
                    }
                )
                + b"\n"
            )
    path = folder / "rollouts" / f"step_{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(lines))


def _response(
    rng: np.random.Generator,
    right_answer: str,
    chance: float,
    progress: float,
    mean_length: int,
    graded: bool,
    tokens: bool,
) -> dict[str, Any]:
    length = max(8, int(rng.gamma(4, mean_length / 4)))
    right = bool(rng.random() < chance)
    cut = not right and bool(rng.random() < 0.05)
    answer = right_answer if right else str(int(rng.integers(2, 12)))
    draws = rng.integers(0, 6 * len(_WORDS), length - 2)
    pieces = [
        " " + (_WORDS[draw % len(_WORDS)] if draw < 5 * len(_WORDS) else _MATHS[draw % len(_MATHS)])
        for draw in draws.tolist()
    ]
    if not cut:
        pieces += [rf" So the answer is \boxed{{{answer}}}.", ""]  # the stop token has no text
    score = None if cut or not graded else round(float(rng.normal(0.2 + 0.6 * progress * right, 0.25)), 5)
    engine = -rng.exponential(0.4, len(pieces))
    record: dict[str, Any] = {
        "response": "".join(pieces),
        "reward": float(right) if graded else None,
        "outcome": ("no_answer" if cut else "correct" if right else "wrong") if graded else "timeout",
        "scored": not cut,
        "zc_logprob": None if score is None else round(-23 + 10 * score, 5),
        "score": score,
        "advantage": round(float(rng.normal()), 5) if graded else None,
        "finish_reason": "length" if cut else "stop",
        "response_ids_length": len(pieces),
        "mean_logprob": float(engine.mean()),
    }
    if tokens:
        policy = engine + rng.normal(0, 0.02, len(pieces))
        entropy = rng.exponential(0.5, len(pieces))
        places = [*range(31, len(pieces), 32), len(pieces)]
        record |= {
            "token_ends": np.cumsum([len(piece) for piece in pieces]).tolist(),
            "token_logprobs": _short(engine),
            "token_policy_logprobs": _short(policy) if graded else None,
            "token_entropy": _short(entropy) if graded else None,
            "readouts": {
                **({} if score is None else {"score": [[len(pieces), score]]}),
                "halfway": [[place, round(float(rng.normal(0.4, 0.2)), 4)] for place in places],
            },
        }
    return record


def _short(values: np.ndarray) -> list[float]:
    return np.round(values, 5).tolist()


def write_timeline(folder: Path, steps: range, ranks: int = 8) -> None:
    """timeline.jsonl of two servers and so many ranks."""
    rng = np.random.default_rng(1)
    with (folder / "timeline.jsonl").open("wb") as file:
        for step in steps:
            spans: list[dict[str, Any]] = []

            def add(
                who: str, phase: str, start: float, end: float, into: list[dict[str, Any]] = spans
            ) -> None:
                into.append({"who": who, "phase": phase, "start": round(start, 4), "end": round(end, 4)})

            generated = 30 + float(rng.normal())
            for number in range(2):
                late = float(rng.uniform(0, 5)) if number else 0.0
                add(f"server {number}", "generate", 0.1, generated - late)
            add("rank 0", "generate", 0.0, generated)
            add("rank 0", "grade", 5.0, generated + 0.3)
            for rank in range(ranks):
                slow = 1.3 if rank == 5 else 1.0
                read = generated + 0.4
                trained = read + 6 + (20 + float(rng.normal(0, 0.3))) * slow
                add(f"rank {rank}", "logprob", read, read + 6)
                add(f"rank {rank}", "train", read + 6, trained)
                add(f"rank {rank}", "sync", generated + 34, generated + 36)
                add(f"rank {rank}", "total", 0.0, generated + 36)
            file.write(orjson.dumps({"step": step, "spans": spans}) + b"\n")


def write_events(folder: Path, steps: int) -> None:
    """events.jsonl: servers, checkpoints, an evaluation every 50 steps, a stop and a resume, a skipped step."""
    events: list[dict[str, Any]] = []

    def add(step: int, kind: str, text: str) -> None:
        events.append({"time": _time(step), "step": step, "kind": kind, "text": text})

    for step in range(50, steps + 1, 50):
        add(step, "evaluation", f"validation after step {step}: accuracy {0.3 + 0.4 * step / steps:.3f}")
    half = max(1, steps // 2)
    add(half, "checkpoint", f"saved step {half}")
    add(half, "stop", "stopped: SIGTERM")
    add(half, "resume", f"resumed from step {half}")
    add(max(1, steps // 3), "server", "http://10.0.0.2:30000 is lost: no answer for 30 s")
    add(max(1, steps // 3), "server", "http://10.0.0.2:30000 is back")
    add(max(1, steps * 2 // 3), "skipped", "an update was skipped: the gradient norm is not finite")
    add(steps, "checkpoint", f"saved step {steps}")
    events.sort(key=lambda event: (event["step"], event["time"]))
    (folder / "events.jsonl").write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in events))


def _time(step: int) -> str:
    return (_START + timedelta(seconds=_STEP_SECONDS * step)).isoformat(timespec="seconds")


def _settings(folder: Path, name: str, steps: int, lr: float) -> dict[str, Any]:
    return {
        "model": {"path": "base", "dtype": "bfloat16"},
        "data": {"train": ["train.jsonl"]},
        "rollout": {
            "engine": "sglang",
            "prompts_per_step": 25,
            "samples_per_prompt": GROUP,
            "max_new_tokens": 1024,
        },
        "reward": {"function": "math_verify"},
        "laser": {"enabled": True, "score_token": "<|vision_start|>", "ref_logprob": -23.0, "beta": 0.1},
        "optimizer": {"lr": lr},
        "logging": {"rollouts_every": 20, "rollouts_tokens": True},
        "run": {"name": name, "steps": steps, "output_dir": str(folder), "seed": 1},
    }


if __name__ == "__main__":
    write_synthetic_run(
        Path(sys.argv[1]),
        steps=int(sys.argv[2]) if len(sys.argv) > 2 else 1000,
        responses=int(sys.argv[3]) if len(sys.argv) > 3 else 10_000,
    )
