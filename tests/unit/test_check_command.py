"""`megatron-laser check`: one line a topic, everything that is wrong at once; and train, which looks at the same."""

import json
import logging
import shutil

import pytest
import yaml
from click import unstyle
from helpers.two_problems import save_model, settings, write_rows
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ConfigError, load_config
from megatron_laser.errors import Finding, UserError
from megatron_laser.run import inputs
from megatron_laser.run.output_folder import claim_output_folder
from megatron_laser.run.preflight import CheckFailed, FindingLog, run_preflight
from megatron_laser.run.preflight.finding_log import Skipped, lines, summary


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("check") / "model")


@pytest.fixture
def run(tmp_path, base):
    """The YAML file of a run in which all is well."""
    write_rows(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(base)))
    return file


def check(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_a_run_in_which_all_is_well_has_a_line_for_each_topic_and_nothing_is_written(run, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = check(run)
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith("no error and no warning")
    assert sorted(tmp_path.iterdir()) == before
    for topic in (
        *("weight files", "tied weights", "weight types", "score token", "tokenizer", "chat template"),
        *("end of response", "references", "prompt lengths", "reward function", "servers", "disk space"),
    ):
        assert f"\n  ok       {topic}" in done.output, topic
    assert [line for line in done.output.splitlines() if line and line[0] != " "][:4] == [
        *("Model", "Data", "Reward", "Machine")
    ]


def test_everything_that_is_wrong_is_said_at_once(run, tmp_path, base):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text("{")
    done = check(run, f"model.path={folder}", "reward.function=nothing", "run.output_dir=/dev/null/x")
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    for word in (
        "tokenizer.json",
        "no reward of this name",
        "/dev/null is a file",
        "not looked at: it needs the",
    ):
        assert word in " ".join(done.output.split()), word
    assert ": the run would not start" in done.output.splitlines()[-1]


def test_as_json_for_programs(run):
    done = check(run, "--json", "data.max_prompt_tokens=3", "batching.tokens_per_micro_batch=64")
    found = json.loads(done.output)
    assert done.exit_code == 0 and (found["errors"], found["warnings"]) == (0, 1)
    (warning,) = [one for one in found["findings"] if one["level"] == "warning"]
    assert warning["group"] == "Data" and warning["topic"] == "prompt lengths"
    assert warning["examples"] and warning["cure"]


def test_a_configuration_that_cannot_be_read_is_one_message(run):
    done = check(run, "run.steps=none")
    assert done.exit_code == 2 and done.output.startswith("error: ") and "run.steps" in done.output


def test_a_start_logs_warnings_alone_and_reads_everything_once(run, monkeypatch, caplog):
    reads = []
    real = inputs.run_preflight

    def watched(config, log, **options):
        from megatron_laser.run.preflight import data

        read = data.read_rows
        monkeypatch.setattr(data, "read_rows", lambda *a, **k: reads.append(a) or read(*a, **k))
        return real(config, log, **options)

    monkeypatch.setattr(inputs, "run_preflight", watched)
    with caplog.at_level(logging.INFO):
        found = inputs.read_inputs(load_config(run, ["data.max_prompt_tokens=3"]))
    found.folder.release()
    assert len(reads) == 1 and len(found.train) == 1
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1 and said[0].startswith("prompt lengths: data.train") and "train.jsonl:1" in said[0]


def test_a_start_ends_at_an_error_before_the_output_folder_is_made(run, tmp_path):
    with pytest.raises(CheckFailed, match=r"score token: data\.train: 1 prompts or answers"):
        (tmp_path / "train.jsonl").write_text('{"problem": "what is <|score|>", "answer": "1"}')
        inputs.read_inputs(load_config(run))
    assert not (tmp_path / "run").exists()


def test_progress_is_told_batch_by_batch(run, monkeypatch):
    monkeypatch.setattr("megatron_laser.data.prompts._BATCH", 1)
    told = []
    run_preflight(load_config(run), FindingLog(), lambda *now: told.append(now))
    assert told == [("train", 1, 2), ("train", 2, 2)]


def test_a_log_that_does_not_stop_turns_what_a_user_can_mend_into_findings():
    log = FindingLog(stop_at_errors=False)
    with log.topic("Group", "one"):
        raise ConfigError(["a: wrong", "b: wrong"], "file.yaml")
    with log.topic("Group", "two"):
        raise PermissionError(13, "Permission denied", "/secret")
    with log.topic("Group", "three"):
        raise Skipped("the tokenizer")
    texts = [(one.topic, one.level, one.text) for one in log.findings]
    assert texts == [
        ("one", "error", "file.yaml; a: wrong; b: wrong"),
        ("two", "error", "/secret: Permission denied"),
        ("three", "note", "not looked at: it needs the tokenizer"),
    ]
    with pytest.raises(KeyError), log.topic("Group", "a crash stays one"):
        raise KeyError("x")


def test_long_texts_are_wrapped_and_no_word_is_cut():
    log = FindingLog(stop_at_errors=False)
    path = "/a/very/long/path/" + "x" * 60
    finding = Finding("topic", "error", f"{'word ' * 20}{path}", (f"{path}: here",), "do this\nand that")
    log.add("Group", [finding])
    shown = [unstyle(line) for line in lines(log, [], 70)]
    assert sum(path in line for line in shown) == 2
    assert all(len(line) <= 70 or path in line for line in shown[:-1])
    assert "-> do this and that" in "\n".join(shown)
    assert shown[-1] == summary(log) == "1 error, 0 warnings: the run would not start"


def said(done, topic):
    """(level, text) of what `check --json` found about `topic`."""
    return [
        (one["level"], one["text"]) for one in json.loads(done.output)["findings"] if one["topic"] == topic
    ]


def assert_error(done, topic, *words):
    (level, text), *more = said(done, topic)
    assert done.exit_code == 2 and level == "error" and not more, done.output
    for word in words:
        assert word in text


def test_lengths_and_layouts_that_train_refuses(run):
    done = check(run, "--json", "data.max_prompt_tokens=4000", "batching.tokens_per_micro_batch=5000")
    assert_error(done, "lengths", "data.max_prompt_tokens 4000 + rollout.max_new_tokens 8 = 4008")
    done = check(run, "--json", "parallel.tensor=64")
    assert_error(done, "layout", "is not divisible by parallel.tensor 64")


def test_an_output_folder_and_checkpoints_of_another_run(run, tmp_path):
    first = load_config(run, [f"checkpoint.folder={tmp_path / 'shared'}"])
    claim_output_folder(first).release()
    before = sorted(tmp_path.rglob("*"))
    same = check(run, "--json", f"checkpoint.folder={tmp_path / 'shared'}")
    assert same.exit_code == 0
    assert said(same, "run.output_dir") == [("note", f"{tmp_path / 'run'} holds this run, which goes on")]
    other_lr = check(run, "--json", f"checkpoint.folder={tmp_path / 'shared'}", "optimizer.lr=1.0")
    text = "optimizer.lr 1e-06 there and 1.0 here: what is learned"
    assert other_lr.exit_code == 0 and said(other_lr, "changed settings") == [("warning", text)]
    other_seed = check(run, "--json", f"checkpoint.folder={tmp_path / 'shared'}", "run.seed=7")
    assert_error(other_seed, "run.output_dir", "belongs to another run: run.seed 1 there and 7 here")
    elsewhere = check(run, "--json", f"checkpoint.folder={tmp_path / 'shared'}", "run.output_dir=other")
    assert_error(elsewhere, "checkpoint.folder", f"belongs to another run, that of {tmp_path / 'run'}")
    assert sorted(tmp_path.rglob("*")) == before


def test_layers_that_this_machine_cannot_build_are_a_warning(run, monkeypatch):
    monkeypatch.setattr("megatron_laser.model.transformer_engine._problem", lambda: "needs what is not here")
    done = check(run, "--json", "model.layers=transformer_engine")
    assert done.exit_code == 0
    ((level, text),) = said(done, "layers")
    assert level == "warning" and "model.layers: transformer_engine needs what is not here" in text


def test_overwriting_moves_nothing_until_all_inputs_are_in_order(run, tmp_path, capsys):
    claim_output_folder(load_config(run)).release()
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):  # without it the other run is left alone
        inputs.read_inputs(load_config(run, ["optimizer.lr=1.0"]))
    for wrong in ("data.train=nope.jsonl", "reward.function=nothing", "laser.score_token=nope"):
        with pytest.raises(UserError):
            inputs.read_inputs(load_config(run, [wrong]), overwrite=True)
        assert not (tmp_path / "run.old-1").exists() and "moved" not in capsys.readouterr().out
    inputs.read_inputs(load_config(run, ["optimizer.lr=1.0"]), overwrite=True).folder.release()
    assert (tmp_path / "run.old-1" / "run.json").exists() and (tmp_path / "run" / "run.json").exists()
    assert f"moved the existing {tmp_path / 'run'} to" in capsys.readouterr().out


def test_train_tells_the_reading_of_the_inputs_to_overwrite(run, tmp_path):
    claim_output_folder(load_config(run)).release()
    done = CliRunner().invoke(app, ["train", str(run), "--overwrite", "data.train=nope.jsonl"])
    assert done.exit_code == 2 and "nope.jsonl" in done.output
    assert "moved" not in done.output and not (tmp_path / "run.old-1").exists()


@pytest.fixture
def model(base, tmp_path):
    """A copy that a test may break, as an override."""
    shutil.copytree(base, tmp_path / "model")
    return tmp_path / "model"


def errors(run, *overrides):
    """{topic: text} of the errors, each topic once."""
    done = check(run, "--json", f"model.path={run.parent / 'model'}", *overrides)
    found = [one for one in json.loads(done.output)["findings"] if one["level"] == "error"]
    assert done.exit_code == 2 and len({one["topic"] for one in found}) == len(found), found
    return {one["topic"]: one["text"] for one in found}


@pytest.mark.parametrize("token_id", [4000, -1])
def test_an_eos_id_outside_of_the_vocabulary_is_the_files(run, model, token_id):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": token_id}))
    (topic, text), *more = errors(run).items()
    assert topic == "end of response" and not more
    assert f"{model / 'generation_config.json'}; eos_token_id: token id {token_id} is not in" in text
    (topic, text), *more = errors(run, "rollout.stop_token_ids=[4000]").items()
    assert (
        topic == "end of response" and text.startswith("rollout.stop_token_ids: token id 4000") and not more
    )


@pytest.mark.parametrize(
    ("file", "content", "topic"),
    [
        ("generation_config.json", "{", "end of response"),
        ("tokenizer.json", "{", "tokenizer"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer.json", "[]", "tokenizer"),
        ("tokenizer.json", '{"added_tokens": [1]}', "tokenizer"),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer"),
        ("config.json", "{", "model"),
        ("config.json", None, "model"),
        ("", None, "model"),
    ],
)
def test_a_broken_file_is_one_error_of_the_topic_that_it_belongs_to(run, model, file, content, topic):
    if content is not None:
        (model / file).write_text(content)
    elif file:
        (model / file).unlink()
    else:
        shutil.rmtree(model)
    assert list(errors(run)) == [topic]


def test_a_folder_in_place_of_a_tokenizer_is_called_one(run, model):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").mkdir()
    assert "Is a directory" in errors(run)["tokenizer"]


def test_a_broken_template_is_one_error(run, model):
    for template in ("{% for m in messages %}{{ m", "no problem in it"):
        (model / "chat_template.jinja").write_text(template)
        assert list(errors(run, "data.apply_chat_template=true")) == ["chat template"]
    (model / "chat_template.jinja").unlink()
    assert list(errors(run, "data.apply_chat_template=true")) == ["chat template"]


def test_what_is_skipped_is_said_once(run):
    done = check(run, "--json", "model.path=nothing")
    notes = [one["topic"] for one in json.loads(done.output)["findings"] if one["level"] == "note"]
    assert len(notes) == len(set(notes)) and {"tokenizer", "disk space", "data.train"} <= set(notes)
