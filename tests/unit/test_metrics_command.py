"""`score`, `metrics` and `verify` over a finished evaluation, as a user runs them, on a tiny random model."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.tiny_run import write_tiny_run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_laser.algorithms.metrics import spearman
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


def test_a_verdict_is_asked_for_in_a_second_prompt_and_judged_like_a_score(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("{problem} {response}")  # the model reads 64 tokens
    options = [
        "--template",
        tmp_path / "prompt.txt",
        "--right-pattern",
        r"\b1\b",
        "--wrong-pattern",
        r"\b2\b",
    ]
    options += ["--verdicts", "2", "--max-new-tokens", "8", "--no-chat-template", "--batch", "64"]
    said = invoke("verify", folder, folder / "eval", *options, "--output", tmp_path / "verified.jsonl")
    rows = lines(tmp_path / "verified.jsonl")
    verdicts = [verdict for row in rows for verdict in row["verdicts"]]
    assert len(rows) == 96 and {True, False, None} == set(verdicts)
    told = f"96 responses, 192 verdicts, {verdicts.count(None)} of them say neither"
    assert told in said and "F1" in said
    for text, verdict in zip([t for row in rows for t in row["verdict_texts"]], verdicts):
        last = [word for word in text.split() if word in ("1", "2")][-1:]
        assert verdict == {("1",): True, ("2",): False}.get(tuple(last))
    invoke("metrics", tmp_path / "verified.jsonl", "--output", tmp_path / "out", "--workers", "1")
    found = judged(tmp_path / "out")
    assert found["num_scored"] == sum(row["score"] is not None for row in rows)
    called = [row["score"] > 0.5 for row in rows if row["score"] is not None and row["reward"] > 0.5]
    assert found["self_reward_accuracy_correct"] == pytest.approx(sum(called) / len(called))
    assert found["released_self_reward_accuracy_incorrect"] > 0


def test_log_ratios_are_those_of_plain_transformers(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    shutil.copytree(folder, base, ignore=shutil.ignore_patterns("eval"))
    state = load_file(base / "model.safetensors")
    save_file(
        {name: value * 1.25 for name, value in state.items()}, base / "model.safetensors", {"format": "pt"}
    )
    target = tmp_path / "ratios.jsonl"
    said = invoke("score", folder, folder / "eval", "--reference", base, "--output", target)
    rows = lines(target)
    saved = {
        (row["row"], row["sample"]): row["response_ids"]
        for row in lines(folder / "eval/problems/responses.jsonl")
    }
    networks = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (folder, base)]
    for row in rows[::9]:
        response = saved[row["row"], row["sample"]]
        prompt = [4 + row["row"] // 4, 24, 4 + row["row"] % 4, 27]
        ids = torch.tensor([[*prompt, *response]])
        sums = []
        for network in networks:
            with torch.no_grad():
                logprobs = network(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(float(logprobs.gather(1, ids[0, len(prompt) :, None]).sum()))
        assert row["logprob"] == pytest.approx(sums[0], abs=1e-3)
        assert row["score"] == row["log_ratio"] == pytest.approx(sums[0] - sums[1], abs=1e-3)
    ratios, lengths = [row["log_ratio"] for row in rows], [row["response_ids_length"] for row in rows]
    found = re.search(r"Spearman (-?[\d.]+), Pearson (-?[\d.]+)", said)
    assert float(found[1]) == pytest.approx(spearman(ratios, lengths), abs=6e-4)
    assert float(found[2]) == pytest.approx(np.corrcoef(ratios, lengths)[0, 1], abs=6e-4)
    other = write_tiny_run(tmp_path / "other").parent
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"17"', '"x"'))
    said = invoke("score", folder, folder / "eval", "--reference", other, exit_code=2)
    assert "its tokenizer is not" in " ".join(said.split())


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
        (["metrics", "EVAL", "--sigmoid"], "--sigmoid and --score-key are for scores in a file"),
        (["metrics", "FILE", "--threshold", "nan"], "expected a finite number"),
        (["metrics", "EVAL", "--only", "aime"], "--only aime: "),
        (
            ["score", "MODEL", "FILE", "--reference", "MODEL", "--url", "http://a:1"],
            "both models are loaded in this",
        ),
        (["verify", "MODEL", "FILE", "--only", "x"], "--only is for the folder of an evaluation"),
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
