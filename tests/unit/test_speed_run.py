"""What a whole run says of its speed, on a CPU: with nothing known of the machine, and with a machine file."""

import json
import math

import pytest
from helpers.tiny_run import write_tiny_run
from helpers.whole_runs import run

from megatron_laser.config import read_architecture
from megatron_laser.config.model_folder.flops import forward_flops

RATES = {
    "rate/flops_per_token",
    "rate/generated_tokens",
    "rate/tokens_per_second_gpu",
    "rate/tokens_per_second_trainer_gpu",
    "rate/tokens_per_second_server_gpu",
    "idle/trainer",
    "idle/servers",
}
ADDED = ("rate/", "mfu/", "servers/", "idle/", "plan/")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def added(line):
    return {name: value for name, value in line.items() if name.startswith(ADDED)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(YAML file, output folder) of a run of two steps that knows nothing of its machine."""
    file = write_tiny_run(tmp_path_factory.mktemp("run"), run={"steps": 2}, logging={"rollouts_every": 1})
    return file, run(file, file.parent / "plain")


def test_a_run_on_a_cpu_says_its_rates_and_who_waited_and_nothing_of_a_peak(plain):
    _, folder = plain
    for line in lines(folder):
        assert set(added(line)) == RATES
        tokens, total, generate = line["tokens"], line["time/total"], line["time/generate"]
        assert line["rate/tokens_per_second_gpu"] == pytest.approx(tokens / total)
        computed = line["time/logprob"] + line["time/train"]
        assert line["rate/tokens_per_second_trainer_gpu"] == pytest.approx(tokens / computed)
        generated = line["rate/generated_tokens"]
        assert generated == pytest.approx(16 * line["response_length_mean"])  # nothing is dropped
        assert line["rate/tokens_per_second_server_gpu"] == pytest.approx(generated / generate)
        assert line["idle/servers"] == pytest.approx(1 - generate / total)
        # It waits for the rollout and for the last grades.
        assert generate + line["time/grade"] <= line["idle/trainer"] * total < total - computed


def test_flops_a_token_are_those_of_the_responses_that_were_dumped(plain):
    file, folder = plain
    architecture = read_architecture(file.parent)
    for step, line in enumerate(lines(folder), start=1):
        dump = (folder / "rollouts" / f"step_{step}.jsonl").read_text()
        responses = [json.loads(row) for row in dump.splitlines()]
        flops = sum(  # "i + j ?" are four tokens
            3 * forward_flops(architecture, 4 + length, length + response["scored"])
            for response in responses
            for length in [response["response_ids_length"]]
        )
        assert line["tokens"] == sum(4 + response["response_ids_length"] for response in responses)
        assert math.isclose(line["rate/flops_per_token"], flops / line["tokens"], rel_tol=1e-12)
