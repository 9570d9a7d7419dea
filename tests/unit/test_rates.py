"""Speed of a step by hand: FLOPs of a tiny model from its shape, tokens a second, MFU, who waited for whom."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import Qwen2Config, Qwen3MoeConfig

from megatron_laser.config import RunConfig
from megatron_laser.model.hf_config import architecture_of
from megatron_laser.observability.live_view import LiveView, plain_line
from megatron_laser.observability.rates import (
    Devices,
    StepWork,
    idle_metrics,
    rate_metrics,
    step_work,
)
from megatron_laser.report.run_data import load_runs
from megatron_laser.report.speed_table import speed_table
from megatron_laser.types import Generation, Group, Prompt, Sample

_SIZES = dict(
    vocab_size=90,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,  # of 8
    num_key_value_heads=2,
    bos_token_id=None,
)
DENSE = architecture_of(Qwen2Config(**_SIZES, intermediate_size=48))
EXPERTS = architecture_of(
    Qwen3MoeConfig(
        **_SIZES,
        intermediate_size=48,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
    )
)
_ATTENTION = 2 * 32 * 32 + 2 * 32 * 16  # queries and output, keys and values
WEIGHTS = {"dense": _ATTENTION + 3 * 32 * 48, "experts": _ATTENTION + 32 * 8 + 3 * (3 * 32 * 24)}


def forward(kind, tokens, rows):
    """Two for each multiply-add: weights, causal pairs (scores and weighted values), rows of the vocabulary."""
    pairs = sum(range(1, tokens + 1))
    return 3 * (2 * WEIGHTS[kind] * tokens + 2 * 2 * 32 * pairs) + 2 * 32 * 90 * rows


def config(**sections):
    data = {
        "model": {"path": "m"},
        "data": {"train": "t.jsonl"},
        "run": {"steps": 10, "output_dir": "runs/first"},
        "laser": {"score_token": "<|score|>", "ref_logprob": -23.0},
    }
    for section, values in sections.items():
        data[section] = data.get(section, {}) | values
    return RunConfig.model_validate(data)


def sample(tokens, *, scored, sampled=None):
    generation = Generation(
        np.arange(tokens), np.zeros(tokens), "stop" if scored else "length", 0, sampled=sampled
    )
    return Sample([7] * 5, generation, "", scored, 1.0)


def group(*samples):
    return Group(Prompt(0, "", "", [7] * 5), list(samples))


# A prompt of 5 tokens with a response of 3 that ended by itself, and one of 6 that was cut off.
BATCH = [group(sample(3, scored=True), sample(6, scored=False))]


@pytest.mark.parametrize(("kind", "architecture"), [("dense", DENSE), ("experts", EXPERTS)])
def test_a_steps_flops_are_those_of_its_sequences(kind, architecture):
    work = step_work(config(), architecture, BATCH)
    assert (work.tokens, work.sampled) == (8 + 11, 3 + 6)
    # A row for each sampled token, and one for the score token behind the response that has a score.
    once = forward(kind, 8, 3 + 1) + forward(kind, 11, 6)
    assert (work.logprob, work.train) == (once, 3 * once)
    # The prompt once; the last token of a response is sampled, and not fed.
    prompt = forward(kind, 5, 0)
    assert work.generate == prompt + forward(kind, 7, 3) - prompt + forward(kind, 10, 6) - prompt


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"policy": {"old_logprobs": "rollout"}}, [(8, 1), (11, 0)]),  # the bodies, and the row of the score
        ({"policy": {"old_logprobs": "rollout"}, "laser": {"score_source": "server"}}, []),
        ({"laser": {"enabled": False}}, [(8, 3), (11, 6)]),
        ({"policy": {"kl_coefficient": 0.1}}, 2 * [(8, 4), (11, 6)]),  # and the reference model's
        (
            {"policy": {"old_logprobs": "rollout", "kl_coefficient": 0.1}, "laser": {"enabled": False}},
            [(8, 3), (11, 6)],
        ),
    ],
)
def test_log_prob_passes_count_where_they_are_made(settings, passes):
    work = step_work(config(**settings), DENSE, BATCH)
    assert work.logprob == sum(forward("dense", *each) for each in passes)


def test_what_an_environment_wrote_is_read_and_not_sampled():
    one = sample(6, scored=True, sampled=np.array([True, True, False, False, False, True]))
    work = step_work(config(), DENSE, [group(one)])
    assert (work.tokens, work.sampled) == (11, 3)
    assert work.train == 3 * forward("dense", 11, 3 + 1)
    assert work.generate == forward("dense", 10, 3)


def test_rates_and_mfu_by_hand():
    work = StepWork(tokens=1200, sampled=800, generate=2e12, logprob=3e12, train=9e12)
    metrics = {
        "time/total": 20.0,
        "time/generate": 10.0,
        "time/logprob": 2.0,
        "time/train": 4.0,
        "rate/generated_tokens": 1000.0,  # a fifth of them for groups that were dropped
    }
    found = rate_metrics(work, Devices(8, 2, 10), metrics, passes=2, peaks=(1e12, 2e12))
    assert found == {
        "rate/flops_per_token": 9e12 / 1200,
        "rate/tokens_per_second_gpu": 1200 / 20 / 10,
        "rate/tokens_per_second_trainer_gpu": 1200 / (2 + 4) / 8,
        "rate/tokens_per_second_server_gpu": 1000 / 10 / 2,
        "mfu/train": 2 * 9 / 4 / 8,
        "mfu/logprob": 3 / 2 / 8,
        "mfu/generate": pytest.approx(2 * (1000 / 800) / 10 / (2 * 2)),
    }
    unknown = rate_metrics(work, Devices(8, 2, 10), metrics, passes=2)
    assert unknown == {name: value for name, value in found.items() if name.startswith("rate/")}
    # A step whose update was given up, and whose batch had been generated before: neither has a rate of its own.
    del metrics["time/generate"]
    early = rate_metrics(work, Devices(8, 2, 10), metrics, passes=0, peaks=(1e12, 2e12))
    assert set(found) - set(early) == {"rate/tokens_per_second_server_gpu", "mfu/train", "mfu/generate"}


@pytest.mark.parametrize(
    ("settings", "server_gpus", "expected"),
    [
        ({}, 0, Devices(4, 1, 4)),  # rank 0 generates
        ({"engine": "sglang", "weight_sync": "disk"}, 6, Devices(4, 6, 10)),
        ({"engine": "sglang", "weight_sync": "colocated"}, 4, Devices(4, 4, 4)),
    ],
)
def test_each_gpu_counts_once(settings, server_gpus, expected):
    assert Devices.of(config(rollout=settings), 4, server_gpus) == expected


def test_idle_shares_by_hand():
    times = {"time/total": 20.0, "time/generate": 10.0}
    expected = {"idle/trainer": 0.6, "idle/servers": 0.65}
    assert idle_metrics(times, waited=12.0, busy=7.0) == expected
    # Servers that say nothing are taken to be busy as long as the rollout runs, as rank 0 is in process.
    assert idle_metrics(times, waited=12.0) == expected | {"idle/servers": 0.5}
    assert idle_metrics(times, waited=20.1)["idle/trainer"] == 1.0
    assert idle_metrics({}, waited=12.0, busy=7.0) == {}


def test_a_line_of_a_step_has_mfu_and_servers_that_idle_where_they_are_known():
    line = {"time/total": 2.0, "time/tokens_per_second": 1500.0, "idle/servers": 0.42, "idle/trainer": 0.5}
    assert plain_line(3, 10, line) == "step  3/10  1.5k tok/s  2.00 s"
    line |= {"mfu/train": 0.314, "servers/utilisation": 0.9}
    assert plain_line(3, 10, line) == "step  3/10  1.5k tok/s  MFU 31%  servers idle 42%  2.00 s"


def test_the_live_view_has_them_beside_tokens_a_second():
    text = io.StringIO()
    output = Console(file=text, force_terminal=True, width=120)
    with LiveView(10, "on", console=output) as view:
        view.update(1, {"time/total": 2.0, "time/tokens_per_second": 1500.0, "mfu/train": 0.314})
    assert "1.5k tok/s MFU 31% " in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())


def write_run(folder: Path, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_report_has_medians_over_the_steps_but_the_first(tmp_path):
    rows = [
        {
            "step": step,
            "time/total": 10.0 * step,
            "rate/tokens_per_second_gpu": 1000.0 * step,
            "mfu/train": 0.1 * step,
            "plan/step_seconds": 20.0,
            "plan/step_ratio": step / 2,
        }
        for step in range(1, 5)
    ]
    one = write_run(tmp_path / "one", rows)
    two = write_run(tmp_path / "two", [{"step": 1, "idle/trainer": 0.25, "rank_imbalance": 0.125}])
    assert speed_table(load_runs([one, two])).splitlines() == [
        "| Median over the steps | one | two |",
        "| --- | ---: | ---: |",
        "| Tokens a second, over all GPUs: each | 3,000.0 | – |",
        "| MFU of updates | 30.0% | – |",
        "| Trainer waits for rollouts | – | 25.0% |",
        "| Busiest data-parallel rank over the mean | – | +12.5% |",
        "| A step: seconds predicted → measured | 20 → 30 (1.50) | – |",
    ]
    plain = write_run(tmp_path / "plain", [{"step": 1, "time/total": 1.0, "rank_imbalance": 0.125}])
    assert speed_table(load_runs([plain])) == ""
