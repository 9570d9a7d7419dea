"""Each alarm fires on a made-up run that has its disease; healthy runs, made up and recorded, are silent."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from helpers.sick_runs import BESIDE, DISEASES, ONSET, STEPS, healthy_run, recorded, sick_run
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_laser.config.schema.alarms import AlarmSettings
from megatron_laser.files import plain
from megatron_laser.observability.alarms import RULES, AlarmWatch, alarms_of, settings_of

DEFAULTS = AlarmSettings()
GENERAL = {"enabled", "window", "needed", "early_steps", "score_patience"}
NAMES = [rule.name for rule in RULES]


@cache
def alarms_of_sick_run(name):
    return alarms_of(sick_run(name), DEFAULTS)


def names_of(rows, settings=DEFAULTS):
    return [alarm.name for alarm in alarms_of(rows, settings)]


def test_every_alarm_has_a_limit_by_its_name_and_a_disease_here():
    assert len(set(NAMES)) == len(NAMES)
    assert set(NAMES) == set(AlarmSettings.model_fields) - GENERAL == set(DISEASES)


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_no_alarms(seed):
    assert names_of(healthy_run(seed=seed)) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_alarm_fires_on_the_run_that_has_its_disease_and_no_other_does(name):
    found = {alarm.name: alarm for alarm in alarms_of_sick_run(name)}
    assert name in found and set(found) <= {name} | BESIDE.get(name, set())
    alarm = found[name]
    assert ONSET <= alarm.step <= STEPS
    assert math.isfinite(alarm.value) and math.isfinite(alarm.threshold)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_message_says_what_since_when_what_it_means_and_where_to_look(rule):
    (alarm,) = [one for one in alarms_of_sick_run(rule.name) if one.name == rule.name]
    since = int(alarm.message.split("since step ")[1].split(".")[0])
    assert ONSET <= since <= alarm.step
    assert alarm.message.startswith(f"{rule.title}: {rule.subject} ") and alarm.message.endswith(rule.means)
    assert all(metric in alarm.place for metric in rule.metrics)
    assert f"docs/{rule.page}" in alarm.place and rule.command in alarm.place
    assert alarm.line.startswith(f"alarm at step {alarm.step}: ") and "\n" not in alarm.line


def test_a_message_has_the_numbers_now_and_before():
    rows = [{"step": step, "entropy": 0.5 if step <= 40 else 0.01} for step in range(1, 61)]
    (alarm,) = alarms_of(rows, DEFAULTS)
    assert alarm.message.startswith(
        "entropy collapse: entropy in nats 0.01 (before 0.5, limit 0.05), 14 of the last 20 steps, since step 41. "
    )
    assert (alarm.step, alarm.last_step, alarm.value, alarm.threshold) == (54, None, 0.01, 0.05)


@pytest.mark.parametrize(("index", "name"), list(enumerate(NAMES)), ids=NAMES)
def test_zero_and_null_switch_an_alarm_off(index, name):
    rows = sick_run(name)[ONSET - 40 :]
    assert name not in names_of(rows, AlarmSettings(**{name: (0, None)[index % 2]}))
    assert names_of(rows, AlarmSettings(enabled=False)) == []


@pytest.mark.parametrize("name", ["tiny_sum_grpo", "tiny_sum_laser", "smollm2_laser"])
def test_recorded_runs_that_learned_what_they_should_have_no_alarms(name):
    rows = recorded(name)
    assert len(rows) > 100 and rows[-1]["reward_mean"] > 0.5
    assert names_of(rows) == []


def test_recorded_runs_that_forgot_to_end_their_responses_say_so_and_when_it_is_over():
    rows = recorded("forgot_to_end")
    first = next(row["step"] for row in rows if row.get("truncated_fraction", 0) > 0.5)
    alarms = alarms_of(rows, DEFAULTS)
    assert [(alarm.name, alarm.step, alarm.last_step) for alarm in alarms] == [
        ("truncated", first + 13, None),
        ("unscored", first + 13, None),
    ]
    alarms = alarms_of(recorded("forgot_and_recovered"), DEFAULTS)
    assert [(alarm.name, alarm.step, alarm.last_step) for alarm in alarms] == [
        ("truncated", 188, 368),
        ("unscored", 188, 368),
    ]


def test_a_recorded_run_whose_policy_became_deterministic_says_so():
    rows = recorded("smollm2_grpo")
    (alarm,) = alarms_of(rows, DEFAULTS)
    assert (alarm.name, alarm.step) == ("entropy_collapse", 98)
    uniform = [row["groups_uniform_fraction"] for row in rows[-20:]]
    assert sum(uniform) / 20 > 0.9, "it is true: nearly all groups had one reward by then"


@pytest.mark.parametrize("name", NAMES)
def test_an_alarm_is_raised_once_and_is_over_when_the_disease_is(name):
    end = ONSET + 60
    rows = sick_run(name, end=STEPS if name == "server_deaths" else end)  # that count does not go back
    (alarm,) = [one for one in alarms_of(rows, DEFAULTS) if one.name == name]
    assert alarm.last_step is not None and alarm.step <= alarm.last_step <= end
    assert alarm.end_line.startswith("alarm over: ") and f"step {alarm.last_step}" in alarm.end_line


def test_an_alarm_at_its_limit_does_not_come_and_go():
    """Seven of ten steps beyond it, then five of ten, then none: on once, over once."""
    shares = [0.7] * 60 + [0.5] * 60 + [0.0] * 40
    rng = random.Random(3)
    rows = [
        {"step": step, "truncated_fraction": 0.9 if rng.random() < share else 0.1}
        for step, share in enumerate(shares, start=1)
    ]
    alarms = alarms_of(rows, DEFAULTS)
    assert len(alarms) == 1 and 100 < alarms[0].last_step < 140
    plain_switching = sum(
        (a["truncated_fraction"] > 0.5) != (b["truncated_fraction"] > 0.5) for a, b in pairwise(rows)
    )
    assert plain_switching > 20


@pytest.mark.parametrize(("index", "name"), list(enumerate(NAMES)), ids=NAMES)
def test_missing_values_neither_raise_nor_end_an_alarm(index, name):
    """Of a sick run without its numbers nothing is known; of one that loses them later the alarm stays on."""
    kept, value = ((False, None), (True, None), (True, math.nan))[index % 3]

    def without(row):
        return {"step": row["step"]} | {key: value for key in row if key != "step" and kept}

    rows = sick_run(name)
    assert names_of([without(row) for row in rows[ONSET - 30 :]]) == []
    (alarm,) = [one for one in alarms_of(rows, DEFAULTS) if one.name == name and one.last_step is None] or [
        None
    ]
    if alarm is not None:
        later = [*rows, *({**without(row), "step": row["step"] + STEPS} for row in rows[:40])]
        assert [one for one in alarms_of(later, DEFAULTS) if one.name == name] == [alarm]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"server_deaths", "skipped_steps"}))
def test_a_run_of_a_few_steps_has_no_alarms(name):
    rows = sick_run(name)
    few = rows[:2] + rows[ONSET - 1 : ONSET + 6]
    assert names_of(few) == [] or name in ("gradient_explosion",)


def test_one_odd_step_raises_nothing_but_what_is_an_event():
    rows = healthy_run()
    for name, disease in DISEASES.items():
        if name not in ("server_deaths", "skipped_steps"):
            disease(rows[ONSET + 3])
    assert names_of(rows) == []


def test_scores_are_judged_only_after_their_loss_was_trained_for_a_while():
    rows = healthy_run()
    for row in rows:
        DISEASES["score_collapse"](row)
    first_trained = next(row["step"] for row in rows if "self_reward_loss" in row)
    (alarm,) = alarms_of(rows, DEFAULTS)
    assert alarm.step == first_trained + DEFAULTS.score_patience + DEFAULTS.needed - 1
    never = [{key: value for key, value in row.items() if key != "self_reward_loss"} for row in rows]
    assert names_of(never) == [], "GRPO whose scores are only watched"


def test_gradients_that_grow_because_a_loss_joins_in_have_not_exploded():
    rows = healthy_run()
    for row in rows[:100]:
        row["self_reward_error"] = row.pop("self_reward_loss", 0.2)
    for row in rows[100:]:
        row["grad_norm"] *= 40.0
    assert names_of(rows) == []
    for row in rows[180:]:
        row["grad_norm"] *= 60.0
    assert names_of(rows) == ["gradient_explosion"]


def test_a_step_of_uniform_groups_counts_those_that_were_dropped():
    row = {"groups_uniform_fraction": 0.0, "prompts_tried": 40, "groups_dropped": 39}
    assert names_of([row | {"step": step} for step in range(1, 30)]) == ["uniform_groups"]
    assert names_of([row | {"step": step, "groups_dropped": 20} for step in range(1, 30)]) == []


def test_deaths_are_counted_anew_after_a_restart_of_the_run():
    """The metric counts since the start of the process."""
    deaths = [0.0] * 30 + [3.0] * 40 + [0.0] * 30 + [1.0] * 40
    rows = [{"step": step, "rollout/server_deaths": count} for step, count in enumerate(deaths, start=1)]
    assert [(alarm.step, alarm.last_step) for alarm in alarms_of(rows, DEFAULTS)] == [(31, 31), (101, 101)]


def test_phases_that_take_no_time_have_no_stragglers():
    row = {"time/total": 10.0, "time/sync": 0.01, "straggler/sync": 9.0}
    rows = [row | {"step": step} for step in range(1, 40)]
    assert names_of(rows) == []
    assert names_of([one | {"time/sync": 2.0} for one in rows]) == ["straggler"]


def test_who_waits_is_asked_only_where_servers_have_gpus_of_their_own():
    row = {"idle/servers": 0.95, "idle/trainer": 0.95}
    servers = row | {"rollout/servers": 2.0}
    runs = {"in process": row, "servers": servers, "in turns": servers | {"time/turns": 0.5}}
    found = {kind: names_of([one | {"step": n} for n in range(1, 30)]) for kind, one in runs.items()}
    assert found == {"in process": [], "servers": ["servers_idle", "trainer_idle"], "in turns": []}


def streamed(rows, settings=DEFAULTS):
    """As a run does: numpy's numbers, an evaluation made up for in a row of its own; what was said on the way."""
    watch, said = AlarmWatch(settings), []
    for row in rows:
        evaluation = {key: value for key, value in row.items() if key.startswith("eval/")}
        trained = {
            key: np.float64(value) if isinstance(value, float) else value
            for key, value in row.items()
            if key not in evaluation
        }
        for part in (trained, evaluation):
            said += [("on", alarm) for alarm in watch.add(row["step"], part)]
            said += [("over", alarm) for alarm in watch.ended]
    return watch, said


def as_written(rows):
    """Through metrics.jsonl and back, where NaN is null."""
    return json.loads(json.dumps([{key: plain(value) for key, value in row.items()} for row in rows]))


@given(
    seed=st.integers(0, 2**20),
    parts=st.lists(
        st.tuples(st.sampled_from(["healthy", *NAMES]), st.integers(1, 60), st.floats(0, 0.5)),
        min_size=1,
        max_size=5,
    ),
    cut=st.floats(0, 1),
)
# Two alarms of one step, of its training and of its evaluation, which is a row of its own while the run goes on.
@example(seed=194146, parts=[("healthy", 2, 0.0), ("score_collapse", 1, 0.0), ("healthy", 20, 0.25)], cut=0.0)
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_run_is_judged_alike_step_by_step_afterwards_and_over_a_restart(seed, parts, cut):
    """Made of stretches of sick and healthy runs, in which a share of the numbers is missing or NaN."""
    rng = random.Random(seed)
    settings = AlarmSettings(window=10, needed=6, early_steps=5, score_patience=10)
    rows = []
    for name, length, gaps in parts:
        source = healthy_run(length) if name == "healthy" else sick_run(name)[ONSET - 1 :][:length]
        for row in source:
            kept = {key: value for key, value in row.items() if rng.random() >= gaps}
            broken = {key: math.nan for key in kept if rng.random() < gaps / 4}
            rows.append(kept | broken | {"step": len(rows) + 1})
    watch, said = streamed(rows, settings)
    assert alarms_of(as_written(rows), settings) == watch.alarms

    # What is said on the way is what stands there in the end, one alarm of a name at a time.
    raised = [(a.step, NAMES.index(a.name)) for kind, a in said if kind == "on"]
    assert sorted(raised) == [(a.step, NAMES.index(a.name)) for a in watch.alarms]
    assert [step for step, _ in raised] == sorted(step for step, _ in raised)
    assert {(a.name, a.step, a.last_step) for kind, a in said if kind == "over"} == {
        (a.name, a.step, a.last_step) for a in watch.alarms if a.last_step is not None
    }
    assert len({alarm.name for alarm in watch.active}) == len(watch.active)

    # A run that is stopped and goes on has read what it had written.
    middle = round(cut * len(rows))
    resumed = AlarmWatch(settings)
    for row in as_written(rows[:middle]):
        resumed.add(row["step"], row)
    assert resumed.alarms == alarms_of(rows[:middle], settings)
    for row in rows[middle:]:
        resumed.add(row["step"], row)
    assert resumed.alarms == watch.alarms


def test_a_step_costs_far_less_than_a_millisecond():
    rows = [row | {f"unrelated/{number}": 0.5 for number in range(300)} for row in healthy_run()]
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        alarms_of(rows, DEFAULTS)
        best = min(best, (time.process_time() - start) / len(rows))
    assert best < 0.5e-3


def test_watching_needs_no_torch():
    code = (
        "import sys; from megatron_laser.observability.alarms import *; alarms_of([{'step': 1}], settings_of({})); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_settings_come_from_a_run_s_config_or_are_the_defaults():
    assert settings_of({"alarms": {"truncated": 0.25}}).truncated == 0.25
    assert settings_of({}) == settings_of({"alarms": None}) == DEFAULTS
    assert settings_of({"alarms": {"of_a_later_version": 1}}) == DEFAULTS


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"needed": 30}, "alarms.needed is 30 of the last alarms.window 20 steps"),
        ({"server_deaths": 21}, "alarms.server_deaths is 21 of the last alarms.window 20"),
        ({"length_growth": 0.5}, "expected a factor above 1, or 0 or null for off"),
        ({"truncated": 1.5}, "less than or equal to 1"),
        ({"mismatch": -0.1}, "greater than or equal to 0"),
        ({"trunctated": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        AlarmSettings(**values)
