"""The command `plan`: what it prints, writes and refuses; and that the recipes' READMEs quote it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.source_tree import ROOT
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.config import load_config, resolve_plan

sys.path.insert(0, str(ROOT / "tools"))
import quote_plans as tool

RECIPE = ["examples/qwen2.5_7b/laser.yaml", "model.path=examples/qwen2.5_7b"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def test_it_prints_phases_memory_layouts_settings_advice_and_assumptions() -> None:
    text = plan(*RECIPE, "--gpus", "8", "--top", "3")
    parts = [
        "as configured: 4 GPUs train, 4 servers of 1 generate, tensor 4 data 1",
        "best: ",
        "why this one",
        "how long each phase takes, and why",
        "memory of the fullest rank",
        "the fastest 3 of",
        "what would help most",
        "assumptions",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), dict(zip(parts, places, strict=True))
    for phase in ("generate", "grade", "logprob", "train", "sync"):
        assert f"\n{phase} " in text
    dry = resolve_plan(load_config(RECIPE[0], RECIPE[1:]), 4)
    assert f"memory: {dry.memory.total / 2**30:.2f} GiB of 79.1 GiB" in text


def test_what_it_writes_is_a_run_with_the_best_layout(tmp_path: Path) -> None:
    target = tmp_path / "fast.yaml"
    found = json.loads(plan(*RECIPE, "--gpus", "8", "--json", "--write", str(target)))
    best = found["best"]
    written = resolve_plan(load_config(target), best["trainer_gpus"])
    assert written.memory.total == best["memory"]["total"]
    assert written.layout.tensor == best["parallel"]["tensor"]
    assert written == resolve_plan(
        load_config(RECIPE[0], [RECIPE[1], *found["overrides"]]), best["trainer_gpus"]
    )
    assert target.read_text().startswith("# examples/qwen2.5_7b/laser.yaml on 8 GPUs (h100)")


def test_json_has_the_seconds_that_the_table_rounds() -> None:
    arguments = [*RECIPE, "--gpus", "8", "--as-configured"]
    found = json.loads(plan(*arguments, "--json"))
    assert found["best"] is None and found["layouts"] == []
    configured = found["as_configured"]
    table = plan(*arguments)
    for phase in configured["phases"]:
        if phase["seconds"] >= 10:
            assert (
                f"{phase['name']:<10}{phase['seconds']:>9,.{0 if phase['seconds'] >= 1000 else 1}f}" in table
            )
    assert configured["gpu_hours_per_1000_steps"] == pytest.approx(configured["seconds"] * 8 / 3.6)


def test_nothing_that_fits_is_exit_status_2_with_arithmetic() -> None:
    text = refused("examples/qwen2.5_32b/laser.yaml", "model.path=examples/qwen2.5_32b", "--gpus", "8")
    assert "no layout fits 8 GPUs" in text and "its largest lines: optimizer" in text
    text = refused(*RECIPE, "--gpus", "8", "--as-configured", "parallel.tensor=1", "parallel.sequence=false")
    assert "memory: a rank needs" in text and "as configured: " in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (RECIPE, "--gpus is missing"),
        ([*RECIPE, "--gpus", "8", "--gpu", "h1000"], "h100"),
        ([*RECIPE, "--gpus", "8", "--server-gpus", "8", "--as-configured"], "at least one GPU left to train"),
        ([*RECIPE, "--gpus", "8", "--write", RECIPE[0]], "that is CONFIG itself"),
        (["examples/qwen2.5_7b", "--gpus", "8", "--as-configured"], "a bare model has no layout of its own"),
        (["examples/qwen2.5_7b", "--calibrate", "machine.yaml"], "expected a run's YAML"),
        (["examples/qwen2.5_7b/laser.yml", "--gpus", "8"], "no such file"),
    ],
)
def test_mistakes_are_named(arguments: list[str], expected: str) -> None:
    assert expected in refused(*arguments)


def test_planning_needs_no_torch() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom megatron_laser.cli import app\n"
        f"done = CliRunner().invoke(app, ['plan', *{RECIPE!r}, '--gpus', '8'])\n"
        "assert done.exit_code == 0, done.output\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"plan loads torch, or fails:\n{done.stderr}"


@pytest.mark.parametrize("path", tool.readmes(), ids=lambda path: path.parent.name)
def test_the_recipes_readmes_quote_what_plan_says_today(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    new, quoted = tool.rewritten(text)
    assert new == text, f"{path} is not up to date: run `{tool.COMMAND}`"
    recipes = [file for file in path.parent.glob("laser*.yaml") if (path.parent / "config.json").exists()]
    assert quoted == len(recipes)
    for recipe in recipes:
        assert f"$ megatron-laser plan examples/{path.parent.name}/{recipe.name} --gpus " in text
