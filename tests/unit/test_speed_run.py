"""What a whole run says of its speed, on a CPU: with nothing known of the machine, and with a machine file."""

import json
import math

import pytest
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import run

from megatron_laser.config import ConfigError, load_config, read_architecture
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


# A CPU of 1 GFLOP/s whose other numbers are an H100's: of efficiencies nothing is expected here.
MACHINE = {"base": "h100", "device": "cpu", "memory_gib": 4.0, "matmul_flops": {"float32": 1.0e9}}
PHASES = ("step", "generate", "grade", "logprob", "train", "sync")


@pytest.fixture(scope="module")
def known(plain):
    """The same run with a machine file."""
    file, _ = plain
    (file.parent / "cpu.yaml").write_text(json.dumps(MACHINE))
    return run(file, file.parent / "known", f"logging.machine={file.parent / 'cpu.yaml'}")


def test_with_a_machine_file_a_run_says_mfu_and_what_was_predicted(known):
    first, second = lines(known)
    mfu = {f"mfu/{phase}" for phase in ("train", "logprob", "generate")}
    plan = {f"plan/{phase}_{what}" for phase in PHASES for what in ("seconds", "ratio")}
    assert set(added(first)) == RATES | mfu | plan
    assert set(added(second)) - plan == RATES | mfu
    for line in (first, second):
        flops = line["rate/flops_per_token"] * line["tokens"]
        assert line["mfu/train"] == pytest.approx(flops / line["time/train"] / 1e9)
        # The old policy's pass is a forward over the same rows.
        assert line["mfu/logprob"] == pytest.approx(flops / 3 / line["time/logprob"] / 1e9)
        assert 0 < line["mfu/generate"] < 1
    for phase in PHASES:
        measured = first["time/total" if phase == "step" else f"time/{phase}"]
        assert first[f"plan/{phase}_ratio"] == pytest.approx(measured / first[f"plan/{phase}_seconds"])
    report = (known / "report.md").read_text()
    assert "## Speed" in report and "A step: seconds predicted → measured" in report


def test_nothing_else_depends_on_it(plain, known):
    assert metrics_without_times(known) == metrics_without_times(plain[1])
    assert not any(name.startswith(ADDED) for line in metrics_without_times(known) for name in line)


def machine_error(file, tmp_path, machine):
    with pytest.raises(ConfigError) as caught:
        run(file, tmp_path / "out", f"logging.machine={machine}")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    return str(caught.value)


def test_a_machine_that_cannot_be_is_refused_before_the_run_begins(plain, tmp_path):
    file, _ = plain
    assert "h1000" in machine_error(file, tmp_path, "h1000")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(json.dumps(MACHINE | {"matmul_flops": {"bfloat16": 1e9}}))
    assert "matmul_flops has no float32" in machine_error(file, tmp_path, wrong)
    assert "missing.yaml" in machine_error(file, tmp_path, tmp_path / "missing.yaml")


@pytest.mark.parametrize(("given", "found"), [("sub/cpu.yaml", True), ("cpu.yml", True), ("h100", False)])
def test_a_machine_file_is_looked_up_beside_the_settings_and_a_name_is_not(tmp_path, given, found):
    file = write_tiny_run(tmp_path, logging={"machine": given})
    assert load_config(file).logging.machine == (str(tmp_path / given) if found else given)
