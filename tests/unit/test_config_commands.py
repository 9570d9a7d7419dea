"""`megatron-laser config show` and `diff`, `--version`, and the completion of overrides."""

import json
import subprocess
import sys

import pytest
import yaml
from helpers.source_tree import ROOT
from helpers.tiny_run import write_tiny_run
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.cli.options import complete_override
from megatron_laser.cli.starting_facts import SUFFIX, Columns, _can_write, find_columns
from megatron_laser.config import load_config
from megatron_laser.config.comparing import compare
from megatron_laser.config.loading import load_with_places
from megatron_laser.config.showing import settings, shown
from megatron_laser.errors import DataError

EXAMPLE = ROOT / "examples" / "qwen2.5_7b" / "laser.yaml"


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("origins", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("rollout.limit=4",),
        ("data.system_prompt='two\n\nlines # no comment'", "run.name='1e5'"),
        ("data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl}]", "rollout.sglang.options={a: '${HOME}'}"),
    ],
)
def test_what_is_shown_is_read_back_equal(tmp_path, overrides, every, origins):
    loaded = load_with_places(EXAMPLE, overrides)
    file = tmp_path / "again.yaml"
    file.write_text(shown(loaded, every=every, origins=origins))
    assert load_config(file) == loaded.config


def test_show_has_what_was_given_and_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "7")
    (tmp_path / "base.yaml").write_text("optimizer: {lr: 1e-5, eps: 1e-7}\nlaser: {enabled: false}\n")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: base.yaml\nmodel: {{path: {tmp_path}}}\ndata:\n  train: t.jsonl\nrun:\n  steps: ${{STEPS}}\n"
        "  output_dir: out\n"
    )
    result = run("config", "show", file, "optimizer.lr=2e-6", "--origins")
    assert result.exit_code == 0, result.output
    comments = {
        line.split(":")[0].strip(): line.partition("  # ")[2]
        for line in result.output.splitlines()
        if "#" in line
    }
    assert comments["lr"] == "override"
    assert comments["eps"] == f"{tmp_path}/base.yaml:1"
    assert comments["train"] == f"{file}:4"
    assert comments["steps"] == f"{file}:6 with ${{STEPS}}"
    assert set(yaml.safe_load(result.output)["optimizer"]) == {"lr", "eps"}
    every = run("config", "show", file, "--all", "--origins").output
    assert len(list(settings(load_config(file)))) == every.count("# default") + every.count(f"# {tmp_path}")


def test_laser_and_grpo_differ_by_what_a_person_would_say():
    result = run("config", "diff", EXAMPLE, EXAMPLE.with_name("grpo.yaml"))
    assert result.exit_code == 1
    learned, _, written = result.output.partition("\n\nwhere things are written:\n")
    assert [line.split() for line in learned.splitlines()] == [
        ["laser.enabled", "true", "->", "false"],
    ]
    assert {line.split()[0] for line in written.splitlines()} == {
        *("rollout.sglang.endpoints", "run.output_dir", "run.name")
    }


def test_diff_ends_as_diff_does(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(shown(load_with_places(EXAMPLE), every=True))
    same = run("config", "diff", folder, EXAMPLE)
    assert (same.exit_code, same.output) == (0, "")
    trouble = run("config", "diff", EXAMPLE, tmp_path)
    assert trouble.exit_code == 2
    assert "no config.yaml in this folder" in trouble.output


def test_sources_are_compared_by_name_and_settings_without_effect_stand_apart():
    a = load_config(EXAMPLE, ["data.train=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 2}]"])
    b = load_config(
        EXAMPLE,
        [
            *("data.train=[{path: b.jsonl, weight: 3}, {path: a.jsonl, weight: 1}]", "laser.enabled=false"),
            *("laser.tau=0.3", "optimizer.lr=2e-6"),
        ],
    )
    found = compare(a, b)
    assert [(one.name, one.a, one.b) for one in found.learned] == [
        ("data.train[b].weight", "2.0", "3.0"),
        ("laser.enabled", "true", "false"),
        ("optimizer.lr", "1e-06", "2e-06"),
    ]
    assert [one.name for one in found.idle] == ["laser.tau"]
    assert "without effect where laser.enabled is false:" in found.lines()


def test_the_version_imports_no_torch():
    code = (
        "import sys; from megatron_laser.cli.version import version_lines; print(*version_lines(), sep='\\n'); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("megatron-laser 0.")
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {
        "python",
        "torch",
        "megatron-core",
        "sglang",
    }
    assert run("--version").output == done.stdout


def test_overrides_are_completed():
    assert "optimizer.lr=" in complete_override("optimizer.l")
    assert complete_override("rollout.sglang.serv") == ["rollout.sglang.servers="]
    assert complete_override("nothing.") == []


def test_columns_are_found_by_name_and_content(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"id": 1, "problem": "", "question": "1 + 1", "answer": None, "target": 2, "digits": "11"}] * 3
    file.write_text("\n".join(map(json.dumps, rows)))
    assert find_columns(file, None, None) == Columns("question", "target")
    assert find_columns(file, "digits", "id") == Columns("digits", "id")
    with pytest.raises(DataError, match="no column 'x'; its columns are id, problem"):
        find_columns(file, "x", None)
    row = {"prompt": "a", "reward_model": {"ground_truth": "4"}}  # verl's
    file.write_text("\n".join(map(json.dumps, [row, row])))
    inner = "reward_model.ground_truth"
    assert find_columns(file, None, None) == find_columns(file, None, inner) == Columns("prompt", inner)
    file.write_text(
        "\n".join(map(json.dumps, [{"problem": "a", "answer": 4}, {"problem": "b", "answer": ""}]))
    )
    with pytest.raises(
        DataError, match=r"'answer' is there, but row 2 has .* Its columns are problem, answer;"
    ):
        find_columns(file, None, None)
    file.write_text(json.dumps({"text": "a", "gold": "b"}))
    with pytest.raises(DataError, match="Its columns are text, gold; name the right one with --prompt-key"):
        find_columns(file, None, None)


def test_whether_a_tokenizer_can_write_the_usual_request_is_asked_without_a_warning_of_its_length():
    class Tokenizer:
        unk_token_id = None

        def __call__(self, text, *, add_special_tokens, verbose):
            assert not add_special_tokens and not verbose  # transformers warns where it may be verbose
            return {"input_ids": [0]}

        def decode(self, ids):
            return "boxed"

    assert _can_write(Tokenizer(), SUFFIX)


@pytest.mark.parametrize("measure", [True, False])
def test_init_writes_a_file_that_check_accepts_and_never_writes_over_one(tmp_path, monkeypatch, measure):
    write_tiny_run(tmp_path)
    (tmp_path / "run.yaml").unlink()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for name, part in (("mine", rows[:12]), ("dev", rows[12:18]), ("held", rows[18:])):
        lines = [json.dumps({"question": row["problem"], "target": row["answer"]}) + "\n" for row in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    file = tmp_path / "first.yaml"
    splits = ["--validation", tmp_path / "dev.jsonl", "--test", tmp_path / "held.jsonl"]
    monkeypatch.chdir(tmp_path.parent)
    how = [
        "--reward",
        f"{tmp_path.name}/lucky.py:lucky",
        "-o",
        file,
        "--measure" if measure else "--no-measure",
    ]
    result = run("config", "init", tmp_path, tmp_path / "mine.jsonl", *splits, *how)
    assert result.exit_code == 0, result.output
    config = load_config(file)
    assert (config.data.prompt_key, config.data.answer_key) == ("question", "target")
    assert config.data.test == (tmp_path / "held.jsonl",) and config.model.dtype == "float32"
    assert config.reward.function == f"{tmp_path}/lucky.py:lucky"
    assert not config.laser.enabled  # an untrained model generates the score token as it does all others
    assert ("the model generated it" if measure else "--no-measure was given") in result.output
    assert "megatron-laser calibrate" in file.read_text()
    before = file.read_text()
    again = run("config", "init", tmp_path, tmp_path / "mine.jsonl", "-o", file)
    typo = run("config", "init", tmp_path, tmp_path / "mine.jsonl", "-o", "new.yaml", "--reward", "lucki")
    assert typo.exit_code == 2 and "no reward of this name" in typo.output
    assert again.exit_code == 2 and str(file) in again.output and file.read_text() == before
    checked = run("check", file)
    assert checked.exit_code == 0, checked.output
