"""Lists of sources in `data`: what they mean, what is wrong with them and on which line, and overrides."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_laser.config import ConfigError, load_config, resolved_yaml
from megatron_laser.config.derived import Source, data_sources
from megatron_laser.config.schema.sources import data_files

TEXT = """\
model: {path: model}
data:
  train:
    - {path: data/math.jsonl, weight: 0.3}
    - path: [web.parquet, /abs/more.parquet]
      weight: 0.1
      reward: judge.py:judge
      name: general
%s
laser: {score_token: <|vision_start|>, ref_logprob: -23.0}
run: {steps: 10, output_dir: runs/first}
"""


def write(folder, text=TEXT % ""):
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def problems(folder, text, *overrides):
    with pytest.raises(ConfigError) as error:
        load_config(write(folder, text), overrides)
    return list(error.value.problems)


def test_sources_have_exact_shares_names_files_and_verifiers(tmp_path):
    config = load_config(write(tmp_path))
    assert data_sources(config, "train") == (
        Source("math", (tmp_path / "data/math.jsonl",), Fraction(3, 4), "math_verify"),
        Source(
            "general",
            (tmp_path / "web.parquet", Path("/abs/more.parquet")),
            Fraction(1, 4),
            f"{tmp_path}/judge.py:judge",
        ),
    )
    assert data_files(config.data.train) == (
        tmp_path / "data/math.jsonl",
        tmp_path / "web.parquet",
        Path("/abs/more.parquet"),
    )
    assert data_sources(config, "validation") == ()


def test_the_resolved_settings_read_back_to_the_same(tmp_path):
    config = load_config(write(tmp_path))
    again = tmp_path / "config.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    "setting", ["a.jsonl", "[a.jsonl]", "{path: a.jsonl}", "[{path: a.jsonl, name: x, weight: 9}]"]
)
def test_one_source_is_the_plain_setting_whatever_its_form(tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    config = load_config(write(tmp_path), [f"data.train={setting}"])
    assert data_sources(config, "train") == (Source("", (tmp_path / "a.jsonl",), Fraction(1), "math_verify"),)


def test_weights_count_one_where_none_is_given(tmp_path):
    config = load_config(write(tmp_path), ["data.train=[{path: a.jsonl, weight: 3}, {path: b.jsonl}]"])
    assert [source.share for source in data_sources(config, "train")] == [Fraction(3, 4), Fraction(1, 4)]


def test_splits_that_evaluate_have_sources_too(tmp_path):
    text = TEXT % "  test: [{path: mmlu.jsonl, reward: r.py:f}, {path: gpqa.jsonl}]"
    found = data_sources(load_config(write(tmp_path, text)), "test")
    assert [(source.name, source.reward) for source in found] == [
        ("mmlu", f"{tmp_path}/r.py:f"),
        ("gpqa", "math_verify"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("weight: 0.1", "wieght: 0.1", "line 6: data.train[1].wieght: unknown key; did you mean `weight`?"),
        (
            "weight: 0.1",
            "share: 0.1",
            "line 6: data.train[1].share: unknown key; the keys of a source are path, weight, reward, name, "
            "samples_per_prompt, max_prompts, temperature",
        ),
        ("weight: 0.1", "weight: 0", "line 6: data.train[1].weight: expected greater than 0, got 0"),
        ("weight: 0.1", "weight: -2", "line 6: data.train[1].weight: expected greater than 0, got -2"),
        ("weight: 0.1", "weight: much", "line 6: data.train[1].weight: expected a number, got 'much'"),
        (
            "name: general",
            "name: math",
            "line 8: data.train[1].name: 'math' is the name of data.train[0], too; give one of them another name",
        ),
        (
            "name: general",
            "name: a/b",
            "line 8: data.train[1].name: expected letters, digits, . _ + - (it becomes a part of metrics' names), "
            "got 'a/b'",
        ),
        (
            "      weight: 0.1\n",
            "      path: b.jsonl\n",
            "line 6: data.train.1.path: given twice (first on line 5); keep one",
        ),
        (
            "{path: data/math.jsonl, weight: 0.3}",
            "{weight: 0.3}",
            "line 4: data.train[0].path: required and not given",
        ),
        (
            "judge.py:judge",
            "'judge.py:'",
            "line 7: data.train[1].reward: expected a registered name, 'package.module:function' or "
            "'path/to/file.py:function', got 'judge.py:'",
        ),
    ],
)
def test_what_is_wrong_with_a_source_is_said_with_its_line(tmp_path, old, new, expected):
    found = problems(tmp_path, (TEXT % "").replace(old, new))
    assert [one.replace(f"{tmp_path}/", "") for one in found] == [expected]


def test_names_made_of_files_may_collide_and_are_named_at_their_source(tmp_path):
    text = (TEXT % "").replace("      name: general\n", "").replace("web.parquet", "math.parquet")
    assert problems(tmp_path, text) == [
        "line 5: data.train[1].name: 'math' is the name of data.train[0], too; give one of them another name"
    ]


def test_a_weight_in_an_evaluation_is_refused(tmp_path):
    assert problems(
        tmp_path, TEXT % "  validation:\n    - {path: v.jsonl}\n    - {path: w.jsonl, weight: 2}"
    ) == [
        "line 11: data.validation[1].weight: 2, but an evaluation takes every problem of each source once; leave it out"
    ]


def test_files_and_sources_are_not_mixed(tmp_path):
    (found,) = problems(tmp_path, (TEXT % "").replace("{path: data/math.jsonl, weight: 0.3}", "math.jsonl"))
    assert "line 3: data.train: expected either files, or sources {path: FILE, ...} throughout" in found


def test_one_key_of_a_source_can_be_overridden_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    overrides = [
        "data.train.math.weight=1",
        "data.train.general.path=x.jsonl",
        "data.train.general.reward=null",
    ]
    found = data_sources(load_config(write(tmp_path), overrides), "train")
    assert [source.share for source in found] == [Fraction(10, 11), Fraction(1, 11)]
    assert found[1].paths == (tmp_path / "work/x.jsonl",) and found[1].reward == "math_verify"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.web.weight=2", "data.train has no source 'web'; its sources are math, general"),
        ("data.train.math.wight=2", "data.train[0].wight: unknown key; did you mean `weight`?"),
        ("data.train.math.weight=0", "data.train[0].weight: expected greater than 0, got 0"),
        ("data.test.math.weight=2", "data.test is no list of sources, of which one has the name 'math'"),
    ],
)
def test_an_override_that_does_not_fit_is_named(tmp_path, override, expected):
    assert problems(tmp_path, TEXT % "", override) == [f"override {override!r}: {expected}"]


def test_lines_of_the_file_are_not_named_for_a_list_that_an_override_gave(tmp_path):
    override = "data.train=[{path: a.jsonl, weight: 0}, {path: b.jsonl}]"
    assert problems(tmp_path, TEXT % "", override) == [
        f"override {override!r}: data.train[0].weight: expected greater than 0, got 0"
    ]
