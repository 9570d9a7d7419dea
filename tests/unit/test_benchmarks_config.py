"""Benchmark files: what they may say, what decides where they are silent, and how mistakes are named."""

from pathlib import Path

import pytest
import yaml
from helpers.source_tree import ROOT

from megatron_laser.config import ConfigError
from megatron_laser.evaluation.benchmarks.settings import load_benchmarks

EXAMPLE = ROOT / "examples" / "benchmarks.yaml"
# samples and lengths of the paper (arXiv 2510.14943)
PAPER = {"math500": 2, "amc23": 32, "aime24": 32, "aime25": 32, "olympiadbench": 2}


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    return file


def write(folder, **content):
    file = folder / "benchmarks.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_the_example_has_the_papers_five_with_its_samples_and_lengths(data):
    overrides = [f"{name}.path={data}" for name in PAPER]
    loaded = load_benchmarks(EXAMPLE, overrides)
    assert {benchmark.name: benchmark.samples for benchmark in loaded} == PAPER
    for benchmark in loaded:
        assert (benchmark.temperature, benchmark.top_p, benchmark.max_new_tokens) == (1.0, 1.0, 8192)
        assert benchmark.prompt_suffix.endswith("put your final answer within \\boxed{}.")
        assert benchmark.reward == "math_verify" and benchmark.apply_chat_template


def test_a_data_file_is_a_benchmark_named_after_it(data):
    (benchmark,) = load_benchmarks(data, ["data.samples=8", "data.prompt_suffix=''"])
    assert (benchmark.name, benchmark.path, benchmark.samples, benchmark.prompt_suffix) == (
        "data",
        data,
        8,
        "",
    )


def test_a_benchmark_wins_over_defaults_and_these_over_the_training_run(tmp_path, data):
    file = write(
        tmp_path,
        defaults={"temperature": 0.7, "max_new_tokens": 64},
        benchmarks={"a": {"path": "data.jsonl", "max_new_tokens": 32}, "b": "data.jsonl"},
    )
    from_run = {"max_new_tokens": 16, "prompt_suffix": " go", "temperature": 0.0}
    a, b = load_benchmarks(file, from_run=from_run)
    assert (a.max_new_tokens, b.max_new_tokens) == (32, 64)
    assert (a.temperature, a.prompt_suffix, a.top_p) == (0.7, " go", 1.0)
    assert a.path == b.path == data


def test_only_the_benchmarks_asked_for_need_their_files(tmp_path, data):
    file = write(tmp_path, benchmarks={"here": "data.jsonl", "elsewhere": "missing.jsonl"})
    assert [b.name for b in load_benchmarks(file, only=["here"])] == ["here"]
    with pytest.raises(ConfigError, match=r"elsewhere\.path: no such file.*add elsewhere\.path=FILE"):
        load_benchmarks(file)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (
            {"benchmarks": {"a": {"path": "data.jsonl", "sample": 3}}},
            [],
            r"a\.sample: unknown; did you mean samples",
        ),
        ({"benchmarks": {"a": {"path": "data.jsonl", "samples": 0}}}, [], r"a\.samples: .*1, got 0"),
        ({"benchmarks": {"a": {"path": "data.jsonl", "top_p": 1.5}}}, [], r"a\.top_p: .*got 1\.5"),
        ({"benchmarks": {"a": {}}}, [], r"a\.path: required"),
        ({"benchmarks": {"../a": "data.jsonl"}}, [], "not a benchmark's name"),
        ({"benchmarks": {}}, [], "no benchmarks"),
        ({"benchmark": {"a": "data.jsonl"}}, [], "benchmark: unknown key"),
        ({"benchmarks": {"a": "data.jsonl"}}, ["b.samples=2"], "unknown; .*a"),
        ({"benchmarks": {"a": "data.jsonl"}}, ["samples=2"], "expected NAME.key=value"),
        ({"benchmarks": {"a": "data.jsonl"}}, ["a.samples=[2"], "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, data, content, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_benchmarks(write(tmp_path, **content), overrides)


def test_an_unknown_name_after_only_lists_the_known_ones(tmp_path, data):
    with pytest.raises(ConfigError, match="--only math: unknown; did you mean math500"):
        load_benchmarks(EXAMPLE, only=["math"])
    with pytest.raises(ConfigError, match="no such file"):
        load_benchmarks(Path(tmp_path / "nowhere.yaml"))
