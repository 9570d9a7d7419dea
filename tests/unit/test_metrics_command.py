"""`score`, `metrics` and `verify` over a finished evaluation, as a user runs them, on a tiny random model."""

import json
import math
import shutil

import pytest
from helpers.tiny_run import write_tiny_run
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.evaluation import read_records
from megatron_laser.testtime import load_model_folder
from megatron_laser.testtime.finished import read_finished

SETTINGS = ["problems.samples=8", "problems.max_new_tokens=12", "problems.prompt_suffix=''"]
SETTINGS += ["problems.apply_chat_template=false", "problems.max_prompt_tokens=8"]
SCORE = ["--score-token", "<|score|>", "--ref-logprob", "-3.5", "--beta", "0.5"]


def invoke(*arguments, exit_code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    write_tiny_run(folder)
    rows = [
        {"problem": f"{i} + {j} ?", "answer": str(i + j), "id": f"p{i}{j}"}
        for i in range(3)
        for j in range(4)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = f"problems.reward={folder / 'lucky.py'}:lucky"
    command = ["eval", folder, folder / "problems.jsonl", *SETTINGS, reward, *SCORE, "--workers", "1"]
    invoke(*command, "--batch", "16", "--output", folder / "eval")
    return folder


@pytest.fixture(scope="module")
def summary(folder):
    return json.loads((folder / "eval" / "results.json").read_text())["benchmarks"]["problems"]["summary"]


def judged(path):
    ((_, detail),) = json.loads((path / "results.json").read_text())["benchmarks"].items()
    return detail["summary"]


def test_eval_itself_has_both_conventions(folder, summary):
    records = read_records(folder / "eval" / "problems" / "records.jsonl")
    assert summary["num_forced"] == sum(one.forced_score is not None for one in records) > 0
    boxed = [one for one in records if one.extracted is not None]
    assert all(one.score is not None or one.forced_score is not None for one in boxed)
    called = [one.extracted is not None and (one.score or one.forced_score or 0) > 0.5 for one in records]
    correct = [c for c, one in zip(called, records) if one.right]
    assert summary["released_self_reward_accuracy_correct"] == pytest.approx(sum(correct) / len(correct))
    assert "F1 (released)" in (folder / "eval" / "report.md").read_text()


def test_the_same_model_over_an_evaluations_answers_gives_its_scores_and_its_metrics(
    folder, summary, tmp_path
):
    said = invoke(
        "score", folder, folder / "eval", *SCORE, "--output", tmp_path / "scored.jsonl", "--batch", "16"
    )
    assert "change against the source's own log-probs: +0.000 nats" in said or "-0.000 nats" in said
    rows = lines(tmp_path / "scored.jsonl")
    for row, one in zip(rows, read_records(folder / "eval" / "problems" / "records.jsonl"), strict=True):
        assert row["score"] == pytest.approx(one.score, abs=1e-5)
        assert row["given_zc_logprob"] == one.zc_logprob if one.scored else "given_zc_logprob" not in row
        assert row["forced_score"] == pytest.approx(one.forced_score, abs=1e-5)
    invoke("metrics", tmp_path / "scored.jsonl", "--output", tmp_path / "out", "--workers", "1")
    again = judged(tmp_path / "out")
    names = [name for name in summary if "self_reward" in name]
    assert len(names) == 21
    for name in names:
        assert again[name] == pytest.approx(summary[name], abs=1e-4), name
    assert "## problems" in (tmp_path / "out" / "report.md").read_text()


def test_the_metrics_of_an_evaluation_are_its_own_and_other_scores_replace_them(folder, summary, tmp_path):
    invoke("metrics", folder / "eval", "--output", tmp_path / "own", "--threshold", "0.5")
    assert judged(tmp_path / "own")["self_reward_f1"] == summary["self_reward_f1"]
    assert judged(tmp_path / "own")["released_self_reward_f1"] == summary["released_self_reward_f1"]
    records = read_records(folder / "eval" / "problems" / "records.jsonl")
    perfect = [{"row": one.row, "sample": one.sample, "score": 4.0 if one.right else -4.0} for one in records]
    (tmp_path / "rm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in perfect))
    options = ["--scores", tmp_path / "rm.jsonl", "--sigmoid", "--output", tmp_path / "rm"]
    said = invoke("metrics", folder / "eval", *options)
    found = judged(tmp_path / "rm")
    assert (found["self_reward_f1"], found["num_scored"]) == (1.0, len(records))
    assert found["self_reward_brier"] == pytest.approx((1 / (1 + math.exp(4))) ** 2)
    assert "1.000" in said
    (tmp_path / "rm.jsonl").write_text(json.dumps(perfect[0]) + "\n")
    result = CliRunner().invoke(app, ["metrics", str(folder / "eval"), *map(str, options)])
    assert result.exit_code == 2 and "95 of the 96 responses have no row" in " ".join(result.output.split())


def test_another_tokenizer_gets_the_texts_and_the_same_one_the_sampled_ids(folder, tmp_path):
    (one,) = read_finished(folder / "eval")
    model = load_model_folder(folder, score_token="<|score|>", ref_logprob=-3.5, beta=0.5)
    ids = one.response_ids(model)
    saved = {
        (row["row"], row["sample"]): row["response_ids"] for row in lines(one.folder / "responses.jsonl")
    }
    assert [saved[record.row, record.sample] for record in one.records] == ids
    copy = tmp_path / "eval"
    shutil.copytree(folder / "eval", copy)
    (copy / "problems" / "responses.jsonl").unlink()
    (other,) = read_finished(copy)
    texts = other.response_ids(model)
    assert all(1 not in response for response in texts)
    assert [model.decode(response) for response in texts] == [record.response for record in one.records]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrics", "FILE", "--scores", "x.jsonl"], "--scores is for the folder of an evaluation"),
        (["metrics", "FILE", "--only", "x"], "--only is for the folder"),
        (["metrics", "EVAL", "--output", "EVAL"], "whose results it would replace"),
        (["metrics", "EVAL", "--only", "aime"], "--only aime: "),
        (["score", "MODEL", "FILE", "--only", "x"], "--only is for the folder of an evaluation"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, tmp_path, arguments, message):
    (tmp_path / "x.jsonl").write_text("{}\n")
    names = {"FILE": tmp_path / "x.jsonl", "EVAL": folder / "eval", "MODEL": folder}
    said = invoke(*(names.get(one, one) for one in arguments), exit_code=2)
    assert message in " ".join(said.replace("│", " ").split())


def test_an_evaluation_whose_problems_were_edited_is_refused(folder, tmp_path):
    copy = tmp_path / "eval"
    shutil.copytree(folder / "eval", copy)
    edited = tmp_path / "problems.jsonl"
    edited.write_text((folder / "problems.jsonl").read_text().replace("2 + 3 ?", "2 + 2 ?"))
    results = json.loads((copy / "results.json").read_text())
    results["benchmarks"]["problems"]["settings"]["path"] = str(edited)
    (copy / "results.json").write_text(json.dumps(results))
    said = invoke("score", folder, copy, *SCORE, "--output", tmp_path / "scored.jsonl", exit_code=2)
    assert "is not the problem that was answered" in " ".join(said.split())
    assert not (tmp_path / "scored.jsonl").exists()
