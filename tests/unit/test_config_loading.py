"""Loading: YAML, overrides, relative paths, and errors that say where and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_laser.config import ConfigError, load_config, resolved_yaml
from megatron_laser.config.loading import config_of

VALID = """\
model: {path: model}
data:
  train: train.jsonl
laser: {score_token: <|vision_start|>, ref_logprob: -23.0}
run: {steps: 10, output_dir: runs/first}
"""


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems(folder: Path, text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        load_config(write(folder, text), overrides)
    return error.value.problems


def test_a_valid_file_loads(tmp_path):
    config = load_config(write(tmp_path, VALID))
    assert config.laser.score_token == "<|vision_start|>"
    assert config.run.steps == 10


def test_paths_in_the_file_start_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    text = VALID.replace("train: train.jsonl", "train: [train.jsonl, ../b.parquet]\n  test: /abs/test.jsonl")
    config = load_config(write(tmp_path / "conf", text + "reward: {function: mine/r.py:grade}\n"))
    folder = tmp_path / "conf"
    assert config.model.path == folder / "model"
    assert config.data.train == (folder / "train.jsonl", tmp_path / "b.parquet")
    assert config.data.test == (Path("/abs/test.jsonl"),)
    assert config.run.output_dir == folder / "runs/first"
    assert config.reward.function == f"{folder}/mine/r.py:grade"


def test_a_relative_file_argument_still_gives_absolute_paths(tmp_path, monkeypatch):
    write(tmp_path / "conf", VALID)
    monkeypatch.chdir(tmp_path)
    assert load_config("conf/run.yaml").model.path == tmp_path / "conf/model"


def test_paths_in_overrides_start_from_the_working_directory(tmp_path, monkeypatch):
    file = write(tmp_path / "conf", VALID)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    config = load_config(file, ["run.output_dir=out", "data.test=[a.jsonl]", "reward.function=r.py:f"])
    assert config.run.output_dir == tmp_path / "work/out"
    assert config.data.test == (tmp_path / "work/a.jsonl",)
    assert config.reward.function == f"{tmp_path}/work/r.py:f"
    assert config.model.path == tmp_path / "conf/model"


def test_a_module_reward_function_is_not_a_path(tmp_path):
    assert load_config(write(tmp_path, VALID), ["reward.function=pkg.mod:f"]).reward.function == "pkg.mod:f"


def test_override_values_are_yaml(tmp_path):
    config = load_config(
        write(tmp_path, VALID),
        [
            "optimizer.lr=1e-5",
            "optimizer.betas=[0.9, 0.95]",
            "laser.score_token=151652",
            "data.shuffle=false",
            "rollout.stop_token_ids=null",
            "policy={minibatches: 2, kl_coefficient: 1e-3}",
            "logging.live=off",
        ],
    )
    assert config.optimizer.lr == 1e-5
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.laser.score_token == 151652
    assert config.data.shuffle is False
    assert config.rollout.stop_token_ids is None
    assert (config.policy.minibatches, config.policy.kl_coefficient, config.policy.epochs) == (2, 1e-3, 1)
    assert config.logging.live == "off"


def test_the_last_of_two_overrides_counts(tmp_path):
    assert load_config(write(tmp_path, VALID), ["run.steps=5", "run.steps=6"]).run.steps == 6


def test_an_override_may_contain_equal_signs(tmp_path):
    config = load_config(write(tmp_path, VALID), ["data.prompt_suffix=' x=y'"])
    assert config.data.prompt_suffix == " x=y"


def test_an_empty_section_means_defaults(tmp_path):
    assert load_config(write(tmp_path, VALID + "policy:\n")).policy.epochs == 1


def test_resolved_yaml_reads_back_to_the_same_configuration(tmp_path):
    config = load_config(write(tmp_path / "a", VALID), ["optimizer.lr=3.3e-7", "logging.live=on"])
    assert load_config(write(tmp_path / "elsewhere", resolved_yaml(config))) == config


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("laser_beta: 1", "line 6: laser_beta: unknown key"),
        ("lr: 1e-6", "line 6: lr: unknown key; did you mean `optimizer.lr`?"),
        ("optimiser: {lr: 1}", "line 6: optimiser.lr: unknown key; did you mean `optimizer.lr`?"),
        ("policy: {lr: 1}", "line 6: policy.lr: unknown key; did you mean `optimizer.lr`?"),
        ("policy: {epoch: 1}", "line 6: policy.epoch: unknown key; did you mean `policy.epochs`?"),
        ("rollout: {samples: 4}", "rollout.samples: unknown key; did you mean `rollout.samples_per_prompt`?"),
        (
            "checkpoint: {temperature: 1}",
            "did you mean `rollout.temperature` or `evaluation.temperature`?",
        ),
        ("batching: {zzz: 1}", "batching.zzz: unknown key; the keys of batching are tokens_per_micro_batch"),
        ("zzzz: 1", "zzzz: unknown key; the sections are model, data, rollout"),
        ("policy: 3", "line 6: policy: expected a section, policy: {key: value}, got 3"),
        ("policy: {epochs: two}", "line 6: policy.epochs: expected an integer, got 'two'"),
        ("policy: {clip_high: abc}", "line 6: policy.clip_high: expected a number, got 'abc'"),
        ("policy: {kl_estimator: k4}", "policy.kl_estimator: expected 'k1', 'k2' or 'k3', got 'k4'"),
        ("policy: {normalize_std: 1}", "policy.normalize_std: expected true or false, got 1"),
        ("rollout: {top_p: 0}", "rollout.top_p: expected greater than 0, got 0"),
        ("rollout: {stop_token_ids: [1, -2]}", "rollout.stop_token_ids[1]: expected greater than"),
        ("optimizer: {betas: 0.9}", "optimizer.betas: expected a list, got 0.9"),
        ("data: {train: x}", "line 6: data: given twice (first on line 2); keep one"),
        ("policy:\n  epochs: 1\n  epochs: 2", "line 8: policy.epochs: given twice (first on line 7)"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line_and_a_remedy(tmp_path, line, expected):
    found = problems(tmp_path, VALID + line + "\n")
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps", "override 'run.steps': expected section.key=value"),
        ("run..steps=3", "expected section.key=value"),
        ("laser.lr=3", "override 'laser.lr=3': laser.lr: unknown key; did you mean `optimizer.lr`?"),
        ("lr=3", "override 'lr=3': lr: unknown key; did you mean `optimizer.lr`?"),
        ("run.steps.x=3", "run.steps is a setting, not a section; did you mean `run.steps`?"),
        ("run.steps=many", "override 'run.steps=many': run.steps: expected an integer, got 'many'"),
        ("run.steps=[", "the value is not valid YAML"),
        ("run=3", "run: expected a section, run={key: value}, or run.key=value"),
    ],
)
def test_a_mistake_in_an_override_is_named_with_a_remedy(tmp_path, override, expected):
    found = problems(tmp_path, VALID, override)
    assert len(found) == 1
    assert expected in found[0]


def test_all_problems_are_reported_together_with_the_file(tmp_path):
    text = "model: {path: m, dtyp: x}\nrun: {steps: ten}\noptimiser: {lr: 1}\n"
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), ["laser.alpha=x"])
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/run.yaml: 6 problems")
    for part in (
        "model.dtyp: unknown key; did you mean `model.dtype`?",
        "data.train: required and not given",
        "run.output_dir: required and not given",
        "run.steps: expected an integer",
        "optimiser.lr",
        "laser.alpha: expected a number",
    ):
        assert part in message
    assert len(message.splitlines()) == 7


def test_cross_field_problems_are_reported_by_loading(tmp_path):
    found = problems(tmp_path, VALID, "parallel.sequence=true", "policy.minibatches=3")
    assert len(found) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("a: b: c", "line 1, column 5: not valid YAML"),
        ("- 1", "expected sections"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_text_that_is_no_mapping_of_sections_is_refused(tmp_path, text, expected):
    (found,) = problems(tmp_path, text)
    assert expected in found


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml.*\n.*no such file"):
        load_config(tmp_path / "absent.yaml")


def test_an_empty_file_lacks_the_required_keys(tmp_path):
    found = problems(tmp_path, "")
    assert [problem.partition(":")[0] for problem in found] == [
        "model.path",
        "data.train",
        "run.steps",
        "run.output_dir",
    ]


def test_settings_that_stand_in_no_file_load_as_a_file_of_them_does(tmp_path):
    config = load_config(write(tmp_path, VALID), ["optimizer.lr=2e-6"])
    plain = {section: dict(values) for section, values in config.model_dump(mode="json").items()}
    plain["optimizer"]["lr"] = 1e-6
    assert config_of(plain, ["optimizer.lr=2e-6"]) == config
    with pytest.raises(ConfigError, match=r"here: 1 problem.*\n.*optimizer.lr: expected a number"):
        config_of(plain, ["optimizer.lr=high"], "here")
