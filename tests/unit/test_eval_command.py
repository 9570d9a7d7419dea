"""`megatron-laser eval` and its sisters as a user runs them, on a random model of a few thousand parameters."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.tiny_run import write_tiny_run
from helpers.torchrun import worker_environment
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.data import DataError
from megatron_laser.evaluation.benchmarks.run import evaluate_benchmarks
from megatron_laser.evaluation.benchmarks.settings import load_benchmarks
from megatron_laser.evaluation.progress import Progress, duration
from megatron_laser.testtime import EngineChoice, TestTimeError, load_model_folder

PAINTED = True  # see helpers/pictures.py
OVERRIDES = ["problems.samples=8", "problems.max_new_tokens=12", "problems.prompt_suffix=''"]
OVERRIDES += ["problems.apply_chat_template=false", "problems.max_prompt_tokens=8"]
PROSE = "Adding the two numbers of the problem gives"
SCORE = ["--score-token", "<|score|>", "--ref-logprob", "-3.5", "--beta", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    write_tiny_run(folder)
    rows = [
        {"problem": f"{i} + {j} ?", "answer": str(i + j), "id": f"p{i}{j}", "solution": f"{PROSE} {i + j}"}
        for i in range(5)
        for j in range(4)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def model_of(folder, **changes):
    return load_model_folder(
        folder, **({"score_token": "<|score|>", "ref_logprob": -3.5, "beta": 0.5} | changes)
    )


def run(folder, output, *overrides, model=None, **options):
    # right when its characters add up to an odd number: a random model is right about nothing
    reward = f"problems.reward={folder / 'lucky.py'}:lucky"
    benchmarks = load_benchmarks(folder / "problems.jsonl", [*OVERRIDES, reward, *overrides])
    options = {"deadline": 120.0, "workers": 1} | options
    return evaluate_benchmarks(
        model or model_of(folder), benchmarks, EngineChoice(max_batch_size=16), output, **options
    )


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An undisturbed evaluation."""
    output = tmp_path_factory.mktemp("whole")
    run(folder, output)
    return output


def test_everything_is_written(whole):
    results = json.loads((whole / "results.json").read_text())
    detail = results["benchmarks"]["problems"]
    assert detail["summary"]["num_responses"] == 160 and 0 < detail["summary"]["num_scored"] < 160
    assert 0 < detail["summary"]["truncated_fraction"] < 1
    assert len(detail["curves"]["best_of"]["mean"]) == 8
    report = (whole / "report.md").read_text()
    for heading in ("## problems", "### Choosing among k responses", "### By length", "## How to read this"):
        assert heading in report
    for name in ("problems_votes.png", "problems_scores.png"):
        assert (whole / "plots" / name).stat().st_size > 10_000 and f"plots/{name}" in report
    problems = [json.loads(line) for line in (whole / "problems" / "problems.jsonl").read_text().splitlines()]
    assert problems[5] == {"row": 5, "id": "p11", "problem": "1 + 1 ?", "answer": "2"}


def test_a_second_run_samples_nothing_and_writes_the_same_bytes(folder, whole):
    before = {name: (whole / name).read_bytes() for name in ("results.json", "report.md")}

    class Refuses:
        def generate(self, *arguments, **options):
            raise AssertionError("all responses are there")

    said = []
    run(folder, whole, engine=Refuses(), say=said.append)
    assert {name: (whole / name).read_bytes() for name in before} == before
    assert "all responses were there" in said[0]


def test_regrading_the_saved_responses_gives_the_same_numbers(folder, whole):
    before = (whole / "results.json").read_bytes()
    run(folder, whole, regrade=True)
    assert (whole / "results.json").read_bytes() == before


def test_killed_in_the_middle_and_run_again_it_has_the_same_numbers(folder, whole, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "megatron_laser", "eval", str(folder), str(folder / "problems.jsonl")]
    command += [*OVERRIDES, f"problems.reward={folder / 'lucky.py'}:lucky", *SCORE]
    command += ["--batch", "16", "--workers", "1", "--output", str(output)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=worker_environment(), stdout=log, stderr=log, start_new_session=True
        )
    responses = output / "problems" / "responses.jsonl"
    try:
        until = time.monotonic() + 120
        while not responses.exists() or responses.read_bytes().count(b"\n") < 40:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = responses.read_bytes()
    assert 40 <= kept.count(b"\n") < 160 and not (output / "results.json").exists()
    run(folder, output)
    assert responses.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert (output / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_another_reference_judges_the_same_responses_anew(folder, whole, tmp_path):
    run(folder, tmp_path, "problems.max_problems=4")
    responses = (tmp_path / "problems" / "responses.jsonl").read_bytes()
    first = json.loads((tmp_path / "results.json").read_text())
    second = run(folder, tmp_path, "problems.max_problems=4", model=model_of(folder, beta=0.25))
    assert (tmp_path / "problems" / "responses.jsonl").read_bytes() == responses
    halved = second["benchmarks"]["problems"]["summary"]["score_wrong_mean"]
    assert halved == pytest.approx(first["benchmarks"]["problems"]["summary"]["score_wrong_mean"] / 2)


def test_responses_of_other_settings_are_not_mixed_in(folder, whole):
    for override in ("problems.temperature=0.5", "problems.samples=4", "problems.seed=2"):
        with pytest.raises(TestTimeError, match=r"holds responses of another evaluation \(.*saved .*, now"):
            run(folder, whole, override)


def test_a_folder_in_use_is_refused(folder, whole):
    import fcntl

    with (whole / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TestTimeError, match="in use by another evaluation"):
            run(folder, whole)


def test_what_the_model_cannot_read_is_refused_with_the_arithmetic(folder, tmp_path):
    with pytest.raises(
        TestTimeError, match=r"prompt 4 \+ max_new_tokens 60 \+ 1 is more.*64.*problems\.max_new_tokens=59"
    ):
        run(folder, tmp_path, "problems.max_new_tokens=60")


def test_without_a_score_token_there_is_no_score(folder, tmp_path):
    model = model_of(folder, score_token=None, ref_logprob=None)
    results = run(folder, tmp_path, "problems.max_problems=3", model=model)
    curves = results["benchmarks"]["problems"]["curves"]
    assert "best_by_logprob" in curves and "best_of" not in curves
    report = (tmp_path / "report.md").read_text()
    assert "no scores" in report and "### The score against the verifier" not in report


def test_votes_are_not_available_where_the_reward_judges_what_is_in_no_box(whole):
    """`lucky` calls texts without a box right: a vote among boxes would be 0 and look worse than chance."""
    results = json.loads((whole / "results.json").read_text())
    detail = results["benchmarks"]["problems"]
    assert detail["summary"]["accuracy"] > 0.2
    assert re.search(r"right responses have no answer to compare", detail["no_votes"])
    assert not [name for name in detail["summary"] if "majority" in name]
    assert not [name for name in {**detail["curves"], **detail["differences"]} if "majority" in name]
    # the best is chosen among all responses: over many subsets of one it is the average
    assert detail["curves"]["best_of"]["mean"][0] == pytest.approx(detail["summary"]["accuracy"])
    report = (whole / "report.md").read_text()
    assert "Votes are not available: " in report and "| majority |" not in report


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{folder}/nowhere", "{folder}/problems.jsonl"], "is not a folder"),
        (["eval", "{folder}", "{folder}/nowhere.jsonl"], "no such file"),
        (["eval", "{folder}", "{folder}/problems.jsonl", "problems.sample=2"], "did you mean samples"),
        (["eval", "{folder}", "{folder}/problems.jsonl", "--url", "host:1"], "is not a server's URL"),
        (
            ["eval", "{folder}", "{folder}/problems.jsonl", "--dtype", "float8"],
            "expected float32 or bfloat16",
        ),
        (["eval", "{folder}", "{folder}/problems.jsonl", "--score-token", "<|scor|>"], "near special tokens"),
        (["eval", "{folder}", "{folder}/problems.jsonl", "problems.reward=nope"], "no reward of this name"),
        (["score", "{folder}"], "give either a JSON Lines file or --serve"),
        (["score", "{folder}", "{folder}/problems.jsonl"], "no score token is known"),
        (["score", "{folder}", "--serve", "--host", "0.0.0.0", *SCORE], "MEGATRON_LASER_PROXY_KEY"),
        (["score", "{folder}", "--serve", "--k", "0", *SCORE], "--k 0"),
        (["calibrate", "{folder}", "{folder}/train.jsonl", "--samples", "0"], "--samples 0"),
        (["calibrate", "{folder}", "{folder}/train.jsonl"], "no chat template"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(folder, arguments, message):
    result = command(*(argument.format(folder=folder) for argument in arguments))
    assert result.exit_code == 2, result.output
    # the terminal's width breaks usage errors into lines
    assert message.replace(" ", "") in result.output.replace("\n", "").replace("│", "").replace(" ", "")


def test_the_score_command_adds_scores_to_a_file(folder, tmp_path):
    source = tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "1 + 2 ?", "response": "\\\\boxed{ 3 }"}\n')
    result = command("score", folder, source, "--no-chat-template", *SCORE)
    assert result.exit_code == 0, result.output
    assert "1 rows, 1 with a score" in result.output
    row = json.loads((tmp_path / "answers.scored.jsonl").read_text())
    assert row["score"] == pytest.approx(0.5 * (row["zc_logprob"] + 3.5))


@pytest.mark.parametrize("name", ["eval", "score", "calibrate"])
def test_help_shows_an_example(name):
    result = command(name, "--help")
    assert result.exit_code == 0 and f"megatron-laser {name}" in result.output


def test_progress_says_speed_and_what_is_left(capsys):
    progress = Progress("aime24", 100)
    for _ in range(40):
        progress.response(10, new=False)
    assert progress.line() == "aime24: 40/100 responses (40%)"
    for _ in range(30):
        progress.response(10, new=True)
    progress._started = time.monotonic() - 3.0
    assert progress.line() == "aime24: 70/100 responses (70%), 100 tokens/s, 3 s left"
    with progress:
        pass
    assert "70/100" in capsys.readouterr().err
    assert [duration(s) for s in (42, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 05 min"]


def test_progress_of_a_training_run_is_a_line_now_and_then(capsys):
    """A silent evaluation of minutes before the first step looks like a run that hangs."""
    lines = queue.Queue()
    with Progress("test split after step 0", 4, say=lines.put, every=0.01) as progress:
        assert (
            lines.get(timeout=20) == "test split after step 0: 0/4 responses (0%)"
        )  # before the first one ends
        progress.response(10, new=True)
        progress.response(10, new=True)
        while not (line := lines.get(timeout=20)).startswith(
            "test split after step 0: 2/4 responses (50%), "
        ):
            assert ": 0/4 " in line or ": 1/4 " in line
    count = lines.qsize()
    assert progress._thread.is_alive() is False and lines.qsize() == count
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["problems.apply_chat_template=true"], r"problems\.apply_chat_template is true, but"),
        (["problems.max_prompt_tokens=2"], r"longer than problems\.max_prompt_tokens = 2"),
        (
            ["problems.max_new_tokens=80"],
            r"max_position_embeddings 64; set problems\.max_new_tokens=59 or less",
        ),
        (
            [f"problems.prompt_suffix=' {'1 ' * 70}'", "problems.max_prompt_tokens=90"],
            r"the longest prompt has 74 tokens, but the model reads 64; set problems\.max_prompt_tokens",
        ),
        (
            ["problems.answer_key=solution", "problems.reward=math_verify"],
            r"problems: no response can equal 20 of 20 references: prose \(20\) \(.*problems\.jsonl:1",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_said_in_the_evaluations_own_settings(
    folder, tmp_path, overrides, message
):
    with pytest.raises((TestTimeError, DataError), match=message):
        run(folder, tmp_path / "eval", *overrides)
