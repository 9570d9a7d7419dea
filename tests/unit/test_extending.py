"""What docs/architecture.md says on adding a reward and an advantage estimator, followed in a copy of the tree.

How many files it takes is counted, and a run of the copy trains with what was added.
"""

import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
from typing import get_args

import pytest
from helpers.models import FAMILIES
from helpers.source_tree import PACKAGE, ROOT
from helpers.tiny_run import write_tiny_run
from helpers.torchrun import worker_environment
from test_docs_architecture import section, spans

from megatron_laser.algorithms.self_reward import SelfRewardLossKind
from megatron_laser.config import SUPPORTED_MODEL_TYPES
from megatron_laser.config.schema.training import LaserConfig
from megatron_laser.model.mapping import LAYER_TABLES
from megatron_laser.rewards import Grade, GradingPool, known_rewards

AT_MOST = 3

MEDIAN = '''def median_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A_v = r - median of the sample's group, [samples] float32."""
    advantages = rewards.double()
    for group in group_ids.unique():
        members = group_ids == group
        advantages[members] -= advantages[members].median()
    return advantages.float()


'''
SHORT = '''"""Right when the response is short."""


def short(response: str, answer: str) -> float:
    """From 1 for nothing at all to 0."""
    return 1.0 / (1 + len(response))
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package, and what its documentation is generated with and into."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("tools/generate_docs.py", "docs/configuration.md", "docs/observing.md"):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


def touched(copy):
    """The files in `copy` that are new or other than here."""
    files = [path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    same = {
        str(file)
        for file in files
        if (ROOT / file).is_file() and filecmp.cmp(ROOT / file, copy / file, False)
    }
    return sorted({str(file) for file in files} - same)


def edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file.name}: {old!r}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def run(copy, *command):
    environment = worker_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(copy), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def named(row):
    """The files of the package and of docs/ in the table's row that begins with `row`."""
    lines = section("docs/architecture.md", "Where to add").splitlines()
    _, where, *_ = next(line for line in lines if line.startswith(f"| {row} |")).strip("| ").split(" | ")
    paths = [span.partition(":")[0] for span in spans(where) if "/" in span and not span.startswith("tools/")]
    return {path if path.startswith("docs/") else f"{PACKAGE}/{path}" for path in paths}


def add_an_estimator(copy):
    algorithms, schema = (
        copy / PACKAGE / "algorithms/advantages.py",
        copy / PACKAGE / "config/schema/training.py",
    )
    edit(algorithms, "# `policy.advantage`:", f"{MEDIAN}# `policy.advantage`:")
    line = '    "reinforce_pp": reinforce_pp_advantages,\n'
    edit(algorithms, line, f'{line}    "median": median_advantages,\n')
    edit(schema, '"reinforce_pp"] |', '"reinforce_pp", "median"] |')
    edit(schema, '"""Advantage estimator: ', '"""Advantage estimator: `median`, reward - group median; ')
    run(copy, "tools/generate_docs.py")


def add_a_registered_reward(copy):
    rewards = copy / PACKAGE / "rewards"
    (rewards / "short.py").write_text(SHORT, encoding="utf-8")
    line = "from megatron_laser.rewards.grade import"
    edit(rewards / "registry.py", line, f"from megatron_laser.rewards.short import short\n{line}")
    line = 'register_reward("math_verify")(grade_math)\n'
    edit(rewards / "registry.py", line, f'{line}register_reward("short")(short)\n')


def test_a_reward_of_a_file_touches_no_file_here(tmp_path):
    (tmp_path / "my.py").write_text(SHORT)
    with GradingPool(workers=1, deadline=10.0, function=f"{tmp_path}/my.py:short") as pool:
        assert pool.grade_many([("", "4"), ("abc", "4")]) == [Grade(1.0, "correct"), Grade(0.25, "wrong")]


@pytest.mark.slow
def test_a_run_trains_with_an_estimator_and_a_reward_that_were_added_in_at_most_three_files_each(
    copy, tmp_path
):
    assert touched(copy) == []

    add_an_estimator(copy)
    estimator = set(touched(copy))
    assert estimator == named("an advantage estimator") and len(estimator) <= AT_MOST
    assert "`median`, reward - group median" in (copy / "docs/configuration.md").read_text(encoding="utf-8")

    add_a_registered_reward(copy)
    reward = set(touched(copy)) - estimator
    assert reward == {f"{PACKAGE}/rewards/registry.py", f"{PACKAGE}/rewards/short.py"}
    assert named("a reward") == {f"{PACKAGE}/rewards/", f"{PACKAGE}/rewards/registry.py"}
    assert "short" not in known_rewards()

    settings = write_tiny_run(
        tmp_path,
        policy={"advantage": "median"},
        reward={"function": "short", "workers": 1},
        laser={"enabled": False},
        logging={"tensorboard": False, "rollouts_every": 1},
        run={"steps": 1, "output_dir": "out", "deadline": 60},
    )
    run(copy, "-m", PACKAGE, "train", settings)

    lines = (tmp_path / "out/rollouts/step_1.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    groups = {sample["row"]: [s for s in samples if s["row"] == sample["row"]] for sample in samples}
    assert len(groups) == 4 and any(sample["advantage"] for sample in samples)
    for group in groups.values():
        rewards = [1.0 / (1 + len(sample["response"])) for sample in group]
        assert [sample["reward"] for sample in group] == pytest.approx(rewards)
        advantages = [reward - statistics.median_low(rewards) for reward in rewards]
        assert [sample["advantage"] for sample in group] == pytest.approx(advantages, abs=1e-6)


def test_what_the_schema_offers_is_what_the_code_has() -> None:
    """A name that is added to one of two places, as the page says, is missed in the other at once."""
    kinds = get_args(LaserConfig.model_fields["loss"].annotation)
    assert kinds == get_args(SelfRewardLossKind), (
        "laser.loss and algorithms/self_reward.py:SelfRewardLossKind"
    )
    families = {config_class.model_type for config_class, _ in FAMILIES.values()}
    assert set(LAYER_TABLES) == set(SUPPORTED_MODEL_TYPES) == families, (
        "config/model_folder/architecture.py, model/mapping.py:LAYER_TABLES and FAMILIES of tests/helpers/models.py"
    )
