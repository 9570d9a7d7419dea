"""Files behind their bases, variables of the environment, numbers of YAML 1.2, further files of settings."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import ConfigError, load_config, resolved_yaml
from megatron_laser.config.loading import load_with_places
from megatron_laser.config.yaml_source import read_yaml
from megatron_laser.config.yaml_text import one_line, yaml_text, yaml_value

BASE = """\
model: {path: model}
data: {train: train.jsonl}
laser: {score_token: <|vision_start|>, ref_logprob: -23.0}
optimizer: {lr: 1.0e-6, weight_decay: 0.1}
run: {steps: 10, output_dir: runs/base}
"""


def write(folder, **files):
    for name, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def problems(file, *overrides):
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides)
    return error.value.problems


def test_a_file_counts_more_than_its_base_and_a_later_base_more_than_an_earlier_one(tmp_path):
    write(tmp_path / "shared", base=BASE, fast="optimizer: {lr: 3e-6}\nrun: {steps: 20}\n")
    write(tmp_path, run="base: [shared/base.yaml, shared/fast.yaml]\nrun: {output_dir: runs/own}\n")
    loaded = load_with_places(tmp_path / "run.yaml")
    config = loaded.config
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.run.steps) == (3e-6, 0.1, 20)
    assert config.model.path == tmp_path / "shared/model"  # from the folder of the file that says it
    assert config.run.output_dir == tmp_path / "runs/own"
    assert loaded.places["run.output_dir"] == f"{tmp_path}/run.yaml:2"
    assert loaded.places["run.steps"] == f"{tmp_path}/shared/fast.yaml:2"
    assert loaded.places["optimizer.weight_decay"] == f"{tmp_path}/shared/base.yaml:4"
    assert "policy.clip_low" not in loaded.places


def test_a_nested_section_is_merged_and_a_list_is_replaced(tmp_path):
    write(
        tmp_path,
        base=BASE + "rollout:\n  stop_token_ids: [1, 2]\n  sglang: {servers: 4, options: {a: 1, b: 2}}\n",
        run="base: base.yaml\nrollout:\n  stop_token_ids: [3]\n  sglang: {tensor: 2, options: {b: 3}}\n",
    )
    rollout = load_config(tmp_path / "run.yaml").rollout
    assert rollout.stop_token_ids == (3,)
    assert (rollout.sglang.servers, rollout.sglang.tensor) == (4, 2)
    assert rollout.sglang.options["b"] == 3


def test_errors_name_the_file_of_the_value(tmp_path):
    write(
        tmp_path, base=BASE.replace("steps: 10", "steps: ten"), run="base: base.yaml\noptimizer: {lr: -1}\n"
    )
    found = " | ".join(problems(tmp_path / "run.yaml"))
    assert f"{tmp_path}/base.yaml, line 5: run.steps: " in found
    assert "line 2: optimizer.lr: " in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base: missing.yaml\n", "line 1: base: no such file: "),
        ("base: {a: 1}\n", "line 1: base: expected a YAML file or a list of them"),
        ("base: other.yaml\n", "goes in a circle, "),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path, text, problem):
    write(tmp_path, run=text, other="base: run.yaml\n")
    assert problem in problems(tmp_path / "run.yaml")[0]


def test_variables_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/data/math")
    monkeypatch.setenv("LR", "2e-6")
    monkeypatch.delenv("STEPS", raising=False)
    text = BASE.replace("{train: train.jsonl}", "\n  train: ${DATA}/train.jsonl").replace("1.0e-6", '"${LR}"')
    own = "run:\n  steps: ${STEPS:7}\n  output_dir: ${RUN:runs}/a\n"
    write(tmp_path, run=text[: text.index("run: ")] + own)
    loaded = load_with_places(tmp_path / "run.yaml")
    assert str(loaded.config.data.train[0]) == "/data/math/train.jsonl"
    assert (loaded.config.optimizer.lr, loaded.config.run.steps) == (2e-6, 7)
    assert loaded.config.run.output_dir == tmp_path / "runs/a"
    assert "${LR}" in loaded.places["optimizer.lr"]


def test_a_variable_that_is_not_set_is_an_error_with_its_line(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    write(tmp_path, run=BASE.replace("train.jsonl", '"${NOWHERE}/a.jsonl"'))
    (problem,) = [one for one in problems(tmp_path / "run.yaml") if "NOWHERE" in one]
    assert problem.startswith("line 2: ") and "${NOWHERE:DEFAULT}" in problem


def test_text_that_the_model_reads_is_left_alone(tmp_path):
    write(tmp_path, run=BASE + 'rollout: {function_options: {a: "$${HOME}"}, function: "m:f"}\n')
    write(tmp_path, tex=BASE.replace("train.jsonl}", 'train.jsonl, prompt_suffix: " in ${x}$"}'))
    assert load_config(tmp_path / "tex.yaml").data.prompt_suffix == " in ${x}$"
    config = load_config(tmp_path / "run.yaml")
    assert config.rollout.function_options == {"a": "${HOME}"}
    again = tmp_path / "again.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config


def test_keys_that_begin_with_x_are_for_anchors(tmp_path):
    text = "x-mine:\n  adam: &adam {lr: 5e-6, weight_decay: 0.2}\n" + BASE.replace(
        "optimizer: {lr: 1.0e-6, weight_decay: 0.1}", "optimizer: {<<: *adam, grad_clip: 2.0}"
    )
    write(tmp_path, run=text)
    optimizer = load_config(tmp_path / "run.yaml").optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.grad_clip) == (5e-6, 0.2, 2.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-6", 1e-6),
        ("+.5", 0.5),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("on", "on"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("2026-11-28", "2026-11-28"),
    ],
)
def test_numbers_and_booleans_are_those_of_yaml_1_2(text, value):
    found = yaml_value(text)
    assert found == value and type(found) is type(value)


def test_what_is_no_number_is_an_error_where_one_is_expected(tmp_path):
    write(tmp_path, run=BASE.replace("steps: 10", "steps: 1:30").replace("0.1", "1_000"))
    found = " | ".join(problems(tmp_path / "run.yaml"))
    assert "line 5: run.steps: expected an integer, got '1:30'" in found
    assert "line 4: optimizer.weight_decay: " in found
    assert "laser.enabled: expected true or false, got 'yes'" in " ".join(
        problems(tmp_path / "run.yaml", "laser.enabled=yes")
    )
    assert load_config(tmp_path / "run.yaml", ["run.steps=010", "optimizer.weight_decay=0"]).run.steps == 10


# PyYAML folds the other separators of lines.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=12)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=4)
)
def test_what_is_written_is_read_back_equal(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("yaml") / "x.yaml"
    file.write_text(yaml_text(data), encoding="utf-8", newline="")
    found = read_yaml(file)
    assert found.data == data and found.problems == []
    assert yaml.safe_load(yaml_text({"a": 1e-7})) == {"a": 1e-7}  # by readers of YAML 1.1, too
    for value in data.values():
        assert yaml_value(one_line(value)) == value


def test_files_of_further_settings_count_between_the_run_and_the_command_line(tmp_path):
    write(
        tmp_path,
        run=BASE,
        more="optimizer.lr: 2e-6\nrun:\n  steps: 30\n",
        last="run: {steps: 40, output_dir: there}\n",
    )
    files = [tmp_path / "more.yaml", tmp_path / "last.yaml"]
    config = load_config(tmp_path / "run.yaml", ["run.seed=9"], files)
    assert (config.optimizer.lr, config.run.steps, config.run.seed) == (2e-6, 40, 9)
    assert config.run.output_dir == tmp_path / "there"
    assert load_config(tmp_path / "run.yaml", ["run.steps=50"], files).run.steps == 50
    (tmp_path / "more.yaml").write_text("optimizer.lrr: 2e-6\n")
    with pytest.raises(ConfigError, match=r"more.yaml, line 1: optimizer.lrr: unknown key.*optimizer.lr"):
        load_config(tmp_path / "run.yaml", (), files)


def test_commands_take_files_of_further_settings(tmp_path):
    write(tmp_path, run=BASE, more="optimizer.lr: -2e-6\n")
    for command in (["train", "--dry-run"], ["check"], ["plan", "--gpus", "8"], ["serve"]):
        arguments = [*command, str(tmp_path / "run.yaml"), "--set-file", str(tmp_path / "more.yaml")]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "more.yaml, line 1: optimizer.lr: expected" in result.output.replace("\n", " ")


def test_the_base_of_two_bases_is_read_once_so_that_it_sets_nothing_back(tmp_path):
    write(
        tmp_path,
        shared=BASE,
        seven="base: shared.yaml\noptimizer: {lr: 7e-6}\n",
        long="base: shared.yaml\nrun: {steps: 70}\n",
        run="base: [seven.yaml, long.yaml]\n",
    )
    config = load_config(tmp_path / "run.yaml")
    assert (config.optimizer.lr, config.run.steps, config.optimizer.weight_decay) == (7e-6, 70, 0.1)
    write(tmp_path, run="base: [seven.yaml, shared.yaml]\n")  # over what it is the base of
    assert "'shared.yaml' is among the bases before it" in problems(tmp_path / "run.yaml")[0]
    write(tmp_path, run="base: [shared.yaml, seven.yaml]\n")
    assert load_config(tmp_path / "run.yaml").optimizer.lr == 7e-6


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            "rollout: {sglang: {options: {a: 1, a: 2}}}\n",
            "line 6: a: given twice (first on line 6); keep one",
        ),
        ("policy: {entropy: !!bool maybe}\n", "'maybe' is neither true nor false"),
        ("policy: {entropy: !!timestamp now}\n", "!!timestamp is no type of YAML 1.2"),
        ("policy: {loss_options: &a {b: *a}}\n", "what has the anchor &a holds itself"),
        ("policy: false\n", "line 6: policy: expected a section, policy: {key: value}, got False"),
        ("policy: {clip_low: ${X:1}}\n", "a ${...} stands in quotes"),
        ("policy:\n  clip_low: ${A:${B:1}}\n", "the default of ${A:...} holds another ${...}"),
        ("policy: {loss_options: null}\n", "loss_options: expected a table, {key: value}, got null"),
        ("reward: {terms: {reward: 1, a: high}}\n", "reward.terms.a.weight: expected a number, got 'high'"),
        ("reward: {function: ''}\n", "reward.function: expected a text that is not empty, got ''"),
        ("checkpoint: {folder: ~no-such-user/x, every: no}\n", "checkpoint.every: expected an integer"),
    ],
)
def test_what_is_no_configuration_is_refused_in_words(tmp_path, more, problem):
    write(tmp_path, run=BASE + more)
    assert problem in " | ".join(problems(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("laser=null", "laser: expected a section, laser={key: value}, or laser.key=value"),
        ("base=other.yaml", "--set-file FILE"),
        ("reward.terms={reward: 1, reward: 2}", "reward is given twice"),
        ("rollout.sglang.options.a.b=1", "rollout.sglang.options is a setting, not a section"),
    ],
)
def test_an_override_that_is_none_says_what_to_write(tmp_path, override, problem):
    write(tmp_path, run=BASE)
    assert problem in " | ".join(problems(tmp_path / "run.yaml", override))


def test_an_override_reaches_an_entry_of_every_table(tmp_path):
    write(
        tmp_path,
        run=BASE + "reward: {terms: {reward: 1.0, brief: {function: my.py:brief, weight: 0.1}}}\n"
        "policy: {loss: 'my.py:loss', loss_options: {a: 1}}\n",
        more="reward.terms.brief.weight: 0.3\nrun.name: 1e5\n",
    )
    given = ["policy.loss_options.b=2", "reward.terms.format=0.5", "reward.terms.reward.weight=2"]
    config = load_config(tmp_path / "run.yaml", given, [tmp_path / "more.yaml"])
    assert config.policy.loss_options == {"a": 1, "b": 2}
    weights = {name: term.weight for name, term in config.reward.terms.items()}
    assert weights == {"reward": 2.0, "brief": 0.3, "format": 0.5}
    assert config.reward.terms["brief"].function == f"{tmp_path}/my.py:brief"
    assert config.run.name == "1e5"  # as `run: {name: 1e5}`
