"""The banner of a start: pure lines of facts, and what is read of the start before it."""

import json

import pytest
import yaml
from helpers.source_tree import ROOT

from megatron_laser.config import load_config, read_architecture
from megatron_laser.run.banner import (
    Change,
    Earlier,
    Resumed,
    SplitFacts,
    banner_lines,
    split_facts,
    start_facts,
)
from megatron_laser.run.earlier_start import branch_of, changes_since, read_last_start
from megatron_laser.trainer.checkpoint.passed_over import passed_over


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "model": {
            "path": str(ROOT / "tests" / "data" / "tiny_model"),
            "dtype": "float32",
            "vocab_multiple": 1,
        },
        "data": {"train": "train.jsonl"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 8},
        "laser": {
            "score_token": "<|score|>",
            "ref_logprob": -5.0,
            "beta": 0.5,
            "reasoning_warmup_steps": 1,
            "self_reward_warmup_steps": 1,
        },
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 2, "export_hf": False},
        "logging": {"tensorboard": False},
        "run": {"steps": 4, "output_dir": "out"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def facts(file, *overrides, **more):
    config = load_config(file, list(overrides))
    given = {
        "ranks": 1,
        "device": "CPU (gloo)",
        "layers": "torch",
        "score_token_id": 2,
        "data": [SplitFacts("train", ["train.jsonl"], problems=20, read=24, too_long=4)],
    }
    return start_facts(config, read_architecture(config.model.path), **(given | more))


def lines(*arguments, width=None, **more):
    return banner_lines(facts(*arguments, **more), width)


def line(found, label):
    (one,) = [text for text in found if text.startswith(f"{label} ")]
    return one[11:]


def test_a_fresh_start_says_what_it_is_made_of_in_a_page(file):
    found = lines(file)
    assert 12 <= len(found) <= 20
    assert line(found, "run") == f"out: 4 steps, in {file.parent}/out"
    parameters = f"{facts(file).parameters:,} parameters"
    assert line(found, "model").endswith(f"llama, {parameters}, float32; layers of torch")
    assert line(found, "data") == (
        "train: 20 problems of train.jsonl; 4 of 24 rows left out: prompts over data.max_prompt_tokens"
    )
    assert line(found, "batch").startswith(
        "4 prompts x 4 samples = 16 responses a step of up to 8 tokens; 1 optimizer step of 16;"
    )
    assert line(found, "LaSeR") == (
        "alpha 0.1, beta_v 0.5, c_ref -5, score token <|score|> (id 2) read by the trainer; loss mse from step 2 on, "
        "advantages tau 0.1 from step 3 on"
    )
    assert line(found, "optimizer").startswith("AdamW, lr 0.001 constant, weight decay 0.01")
    assert (
        line(found, "saves")
        == f"every 2 steps and at the end to {file.parent}/out/checkpoints, kept: the last 2"
    )
    assert line(found, "start") == "at step 1, from the weights of model.path"
    assert f"megatron-laser status {file.parent}/out" in line(found, "look")
    assert not any(text.startswith(("resumes", "changed", "before", "edited", "not used")) for text in found)


@pytest.mark.parametrize(
    ("overrides", "label", "says"),
    [
        (["laser.enabled=false"], "LaSeR", "off: plain policy gradient"),
        (["laser.reasoning_warmup_steps=9"], "LaSeR", "loss mse from step 10 on (the run has 4)"),
        (["laser.alpha=0"], "LaSeR", "loss mse never"),
        (["policy.minibatches=2", "policy.epochs=3"], "batch", "6 optimizer steps of 8 in 3 passes"),
        (
            ["optimizer.schedule=cosine", "optimizer.warmup_steps=2"],
            "optimizer",
            "cosine to 0 at optimizer step 4 aft",
        ),
        (["policy.kl_coefficient=0.01"], "policy", "KL 0.01 (k3)"),
        (["checkpoint.every=0"], "saves", "no checkpoints but when it is stopped"),
        (
            ["checkpoint.asynchronous=true", "checkpoint.keep_every=10"],
            "saves",
            "in the background and at the end",
        ),
        (
            ["logging.rollouts_every=5", "logging.tensorboard=true"],
            "writes",
            "rollouts/ every 5 steps, tensorboard/",
        ),
        (["run.mode=rollout_only"], "optimizer", "none: nothing is trained"),
        (["run.mode=rollout_only"], "mode", "rollout_only: responses go to"),
        (["run.fake.responses=true"], "engine", "none: responses are made up"),
        (["run.fake.weights=true"], "model", "float32 (made-up weights)"),
    ],
)
def test_a_setting_that_matters_is_said(file, overrides, label, says):
    assert says in line(lines(file, *overrides), label)


def test_several_ranks_and_servers_are_counted_and_named(file):
    servers = ["http://a:1", "http://b:2"]
    found = lines(
        file,
        *(
            "rollout.engine=sglang",
            "rollout.weight_sync=disk",
            "rollout.sglang.urls=[http://a:1, http://b:2]",
        ),
        "parallel.tensor=2",
        ranks=4,
        servers=servers,
    )
    assert line(found, "layout") == "4 ranks on CPU (gloo): tensor 2, data-parallel 2"
    assert line(found, "engine") == "2 SGLang servers: http://a:1, http://b:2; weights by disk"


def test_a_resumed_start_says_from_where_and_why_there_and_what_is_not_as_it_was(file):
    resumed = Resumed(
        step=2,
        path="out/checkpoints/step_00000002",
        done_before=3,
        passed_over=["step_00000004.partial: why"],
    )
    found = lines(
        file,
        resumed=resumed,
        earlier=Earlier("2026-01-02T03:04:05Z", "stopped after step 3: SIGTERM"),
        changes=[
            Change("optimizer.lr", 1e-3, 5e-4, "learning", 3),
            Change("model.recompute", "none", ["mlp"]),
        ],
        edited=["reward.py"],
        notes=["checkpoints after step 2 were moved"],
    )
    assert line(found, "resumes") == (
        "at step 3, from the checkpoint out/checkpoints/step_00000002; step 3 was done before and is done again"
    )
    assert line(found, "not used") == "step_00000004.partial: why"
    assert (
        line(found, "before") == "the last start began 2026-01-02T03:04:05Z and stopped after step 3: SIGTERM"
    )
    place = next(i for i, text in enumerate(found) if text.startswith("changed"))
    assert found[place][11:] == "optimizer.lr: 0.001 -> 0.0005 (learning), from step 3 on"
    assert found[place + 1] == " " * 11 + "model.recompute: none -> [mlp]"
    assert line(found, "note") == "checkpoints after step 2 were moved"
    assert line(found, "edited") == "reward.py: rewards come from the new code from here on"
    assert not any(text.startswith("start ") for text in found)


def test_on_a_terminal_lines_are_broken_under_their_text_and_nothing_is_lost(file):
    wide, narrow = lines(file), lines(file, width=80)
    paths = len(str(file.parent))
    assert max(map(len, narrow)) <= max(80, 11 + paths + 30)  # a path is not broken
    assert " ".join(" ".join(narrow).split()) == " ".join(" ".join(wide).split())
    assert all(text[:11].strip() == "" or text[10] == " " for text in narrow)


def test_the_facts_are_json_and_their_sentence_names_the_changes(file):
    fresh = facts(file)
    assert fresh.summary == "starts at step 1 of 4 on 1 rank"
    changed = facts(
        file, resumed=Resumed(2, "p"), changes=[Change("a.b", 1, 2), Change("c.d", 1, 2)], ranks=2
    )
    assert changed.summary == "goes on at step 3 of 4 on 2 ranks; changed: a.b, c.d"
    assert json.loads(json.dumps(changed.as_json()))["resumed"]["step"] == 2


def test_of_sources_each_has_its_problems_and_its_share(file):
    sources = "[{name: a, path: train.jsonl, weight: 3}, {name: b, path: train.jsonl, weight: 1}]"
    config = load_config(file, [f"data.train={sources}"])
    found = split_facts(config, "train", 10, ["a"] * 5 + ["b"] * 3)
    assert (found.problems, found.read, found.too_long) == (8, 10, 2)
    assert found.sources == {"a": 5, "b": 3} and found.shares == {"a": 0.75, "b": 0.25}
    text = line(lines(file, data=[found]), "data")
    assert "sources a 5 (75% of the prompts), b 3 (25% of the prompts); 2 of 10 rows left out" in text


def test_problems_of_an_evaluation_that_are_not_used_are_told_apart_from_those_left_out(file):
    config = load_config(file, ["data.test=train.jsonl"])
    found = split_facts(config, "test", 10, [""] * 8, most=3)
    text = line(lines(file, data=[found]), "data")
    assert "test: 3 problems of" in text
    assert text.endswith("2 of 10 rows left out: prompts over data.max_prompt_tokens; 5 more not used: "
                         "evaluation.max_prompts")  # fmt: skip


def write_start(folder, config, **record):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"name": "out", **record}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


def events(folder, *kinds_and_texts):
    written = [{"time": "T", "step": 1, "kind": kind, "text": text} for kind, text in kinds_and_texts]
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written))


def test_what_has_changed_since_the_last_start_is_what_differs_in_its_settings(file, tmp_path):
    assert read_last_start(tmp_path) is None and changes_since(None, load_config(file), tmp_path) == []
    before = load_config(file, ["model.recompute=full"])
    old = {"step": 1, "key": "optimizer.lr", "from": 1, "to": 2, "kind": "learning"}
    write_start(tmp_path, before, changes=[old])
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"st')
    last = read_last_start(tmp_path)
    assert last is not None and last.last_step == 7
    assert changes_since(last, before, tmp_path) == []
    now = load_config(file, ["optimizer.lr=0.5", "evaluation.seed=2", "run.name=other"])
    # This start records what it changed beside what an earlier one had.
    new = {"step": 8, "key": "optimizer.lr", "from": 0.001, "to": 0.5, "kind": "learning", "time": "T"}
    write_start(tmp_path, now, changes=[old, new], branched_from={"folder": "r/a", "step": 4, "id": "x"})
    found = {change.key: change for change in changes_since(last, now, tmp_path)}
    assert set(found) == {"model.recompute", "optimizer.lr", "evaluation.seed"}
    assert found["optimizer.lr"] == Change("optimizer.lr", 0.001, 0.5, "learning", 8)
    assert found["evaluation.seed"] == Change("evaluation.seed", 1234, 2)
    assert branch_of(tmp_path) == "step 4 of r/a"
    inner = {"step": 8, "key": "logging.profile.steps", "from": None, "to": [1, 2], "kind": "running"}
    profiled = load_config(file, ["logging.profile.steps=[1, 2]"])
    write_start(tmp_path, profiled, changes=[old, inner | {"time": "T"}])
    keys = [change.key for change in changes_since(last, profiled, tmp_path)]
    assert keys == ["model.recompute", "logging.profile.steps"]  # and not logging.profile as a whole besides
    write_start(tmp_path, now, changes=[old, new], branched_from={"folder": "r/a", "step": 4, "id": "x"})
    # In a branch nothing was started before, and what differs from the run that it comes from is recorded.
    assert [change.key for change in changes_since(None, now, tmp_path)] == ["optimizer.lr"]


@pytest.mark.parametrize(
    ("written", "ended"),
    [
        ([("start", "s"), ("stop", "stopped after step 3: SIGTERM")], "stopped after step 3: SIGTERM"),
        ([("start", "s"), ("end", "failed (X) after step 3")], "failed (X) after step 3"),
        (
            [("start", "s"), ("checkpoint", "saved x")],
            "ended without saying so: it was killed, or its machine went",
        ),
        ([("checkpoint", "saved x")], ""),  # of an earlier version
    ],
)
def test_how_the_last_start_ended_is_its_last_word(file, tmp_path, written, ended):
    write_start(tmp_path, load_config(file))
    events(tmp_path, *written)
    found = read_last_start(tmp_path).earlier
    assert found.ended.startswith(ended) and bool(found.ended) == bool(ended)
    assert found.started == ("T" if written[0][0] == "start" else "")


def test_checkpoints_that_are_not_used_are_named_with_the_reason(tmp_path):
    assert passed_over(tmp_path / "none", -1) == []
    for name in ("step_00000002", "step_00000004", "step_00000006"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    for name in ("step_00000001.partial", "step_00000008", "step_00000010.partial", "other"):
        (tmp_path / name).mkdir()
    found = passed_over(tmp_path, 4)
    assert [text.partition(":")[0] for text in found] == [
        "step_00000006",
        "step_00000008",
        "step_00000010.partial",
    ]
    assert "another one was asked for" in found[0] and "no state.json" in found[1] and "deleted" in found[2]
    assert len(passed_over(tmp_path, 6)) == 2
