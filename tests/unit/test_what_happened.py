"""What a run's files say besides learning: in the report's section and in the last lines."""

import json
from pathlib import Path

import pytest
from helpers.runs import run_config
from helpers.sick_runs import healthy_run, sick_run
from helpers.synthetic_run import write_synthetic_run

from megatron_laser.config.schema.alarms import AlarmSettings
from megatron_laser.evaluation.keeping import Keeping
from megatron_laser.report.run_data import load_runs
from megatron_laser.report.went_wrong import went_wrong
from megatron_laser.report.what_happened import NOTHING, read_events, what_happened
from megatron_laser.rewards.grade import NOT_ONE_GRADED
from megatron_laser.run.last_words import last_words

LIMITS = AlarmSettings()
BEST = ["checkpoint.best.metric=eval/majority", "run.early_stop.metric=eval/majority"]


def event(step, kind, text):
    return {"time": "T", "step": step, "kind": kind, "text": text}


def happened(rows=(), events=()):
    return what_happened(list(rows), events, LIMITS)


def words(found, **more):
    given = {"seconds": 75.0, "first_step": 1, "steps": 250, "checkpoints": Path("ck"), "newest": None}
    return last_words("finished", found, Path("nowhere"), **(given | more))


HEALTHY = [
    event(0, "start", "starts at step 1"),
    event(2, "checkpoint", "saving to ck in the background"),
    event(2, "checkpoint", "saved ck/step_00000002: 1 B in 1.0 s"),
    event(4, "checkpoint", "saved ck/step_00000004: 1 B in 1.0 s"),
    event(4, "checkpoint", "deleted step_00000002"),
    event(4, "evaluation", "validation after step 4: accuracy 0.5"),
    event(4, "stop", "stopped after step 4: SIGTERM"),
    event(4, "resume", "goes on from the checkpoint of step 4"),
    event(4, "start", "goes on at step 5"),
]


def test_of_a_healthy_run_nothing_is_said_to_be_wrong():
    found = happened(healthy_run(), HEALTHY)
    assert found.wrong == [] and found.steps == 250
    assert (len(found.saves), found.starts, found.killed) == (2, 2, 0)
    assert words(found, newest=4, first_step=5) == [
        "ended      finished: 250 of 250 steps, 246 of them by this start; 1m15s since this start",
        f"wrong      nothing: {NOTHING}",
        "saved      2 saves, the newest checkpoint is of step 4, in ck",
        "written    nothing in nowhere",
    ]


def test_a_step_of_which_nothing_was_graded_has_no_line_of_metrics_and_is_told():
    stop = event(4, "stop", f"stopped after step 4: rollout of step 5: {NOT_ONE_GRADED}, so there is nothing")
    found = happened(healthy_run(), [*HEALTHY, stop])
    assert found.wrong == [f"a start ended at step 4: {stop['text']}"]


def test_an_export_is_no_trouble_and_responses_of_evaluations_that_nobody_graded_are():
    rows = [{**row, "eval/outcome/crash": 4.0} if row["step"] in (3, 6) else row for row in healthy_run()]
    found = happened(rows, [*HEALTHY, event(4, "checkpoint", "exported hf_step_4")])
    assert found.wrong == ["in evaluations 8 responses were not graded and counted as wrong: crash 8"]


def test_evaluations_without_the_metric_of_the_best_are_counted(tmp_path, caplog):
    keeping = Keeping(
        run_config(tmp_path, tmp_path, "data.validation=v.jsonl", "evaluation.every=1", *BEST), None
    )
    keeping.add(1, {"eval/accuracy": 1.0})
    (said,) = [record.getMessage() for record in caplog.records]
    found = happened(healthy_run(), [*HEALTHY, event(1, "evaluation", said), event(2, "evaluation", said)])
    assert found.wrong == [
        "2 evaluations were not compared with the best; the last: step 2: the evaluation after step 1 has no "
        "eval/majority; it does not count for what is the best"
    ]


def test_every_kind_of_trouble_is_counted_and_named():
    rows = [
        {
            "step": 0,
            "bad_steps": 9.0,
            "grading_failed": 9,
        },  # an evaluation before the first step trains nothing
        {"step": 1, "outcome/correct": 5, "outcome/timeout": 2, "outcome/crash": 0, "grading_failed": 2},
        {"step": 2, "outcome/correct": 4, "outcome/timeout": 1, "outcome/crash": 2, "grading_failed": 4},
        {"step": 3, "bad_steps": 2.0, "function_failed_error": 3, "function_failed_invalid": None},
    ]
    found = happened(
        rows,
        [
            event(0, "start", "a"),
            event(0, "start", "b"),
            event(2, "fallback", "less is kept"),
            event(3, "fallback", "less is kept"),
            event(3, "skipped", "2 of 2 skipped: policy_loss"),
            event(4, "skipped", "1 of 2 skipped: grad norm"),  # it ended the run before its line
            event(2, "server", "http://a is lost: no answer"),
            event(2, "server", "http://a is back"),
            event(3, "server", "http://b was started again"),
            event(3, "server", "weight sync of step 3: broke"),
            event(2, "checkpoint", "the checkpoint was not saved, the last published one stays valid: full"),
            event(3, "warning", "rank 3 is slow"),
            event(3, "evaluation", "SIGTERM: an evaluation is left out (stopped)"),
        ],
    )
    assert found.skipped == {3: 2, 4: 1}
    assert [text for text in found.wrong if not text.startswith("alarm ")] == [
        "3 updates were skipped because loss or gradient norm was not finite, in steps 3, 4: the batches are in "
        "bad_steps/; the last one: 1 of 2 skipped: grad norm",
        # 9 right, 5 of the kinds, and one that no group of the batch has
        "6 of 15 responses were not graded and left out: timeout 3, crash 2, other 1",
        "3 samples were not made by rollout.function and left out: error 3",
        "a save failed at step 2: the checkpoint was not saved, the last published one stays valid: full",
        "servers were lost 2 times and came back 1; the last: step 3: http://b was started again",
        "fallback at step 2 (and 1 more): less is kept",
        "an evaluation at step 3: SIGTERM: an evaluation is left out (stopped)",
        "warning at step 3: rank 3 is slow",
        "1 of 2 starts ended without saying so: killed, or its machine went down",
    ]
    assert [text[11:] for text in words(found) if text.startswith((" ", "wrong"))] == found.wrong


def test_alarms_are_named_with_their_steps_and_where_to_look():
    found = happened(sick_run("truncated"))
    (alarm,) = [text for text in found.wrong if "truncated," in text]
    assert alarm.startswith("alarm truncated, from step ") and "; look at truncated_fraction, " in alarm


def test_many_of_one_kind_are_told_in_part_and_all_counted():
    found = happened([], [event(step, "fallback", f"{step} fell back") for step in range(9)])
    assert len(found.wrong) == 6 and found.wrong[-1] == "fallback: 4 more, see events.jsonl"


def test_the_report_has_it_from_the_files_alone_for_each_run(tmp_path):
    sick = write_synthetic_run(tmp_path / "sick", steps=60, responses=0)
    well = write_synthetic_run(tmp_path / "well", steps=60, responses=0, old_format=True, name="well")
    runs = load_runs([sick, well])
    heading, body = went_wrong(runs)
    assert heading == "## What went wrong\n" and "**well**: nothing." in body
    assert "servers were lost 1 time and came back 1" in body and "1 update was skipped" in body
    assert went_wrong(runs[1:])[0] == "## Nothing went wrong\n" and NOTHING in went_wrong(runs[1:])[1]


def test_events_that_cannot_be_read_are_passed_over(tmp_path):
    assert read_events(tmp_path) == []
    (tmp_path / "events.jsonl").write_text('{"step": 1, "kind": "stop"}\n[]\nnonsense\n{"kind": 7}\n{"ste')
    assert len(read_events(tmp_path)) == 2 and happened([], read_events(tmp_path)).wrong == []


def test_text_of_a_log_is_no_markup_of_the_report(tmp_path):
    folder = write_synthetic_run(tmp_path / "run", steps=10, responses=0, old_format=True)
    (folder / "events.jsonl").write_text(json.dumps(event(3, "warning", "a <b> *c* | d")) + "\n")
    assert r"a &lt;b> \*c\* \| d" in went_wrong(load_runs([folder]))[1]


@pytest.mark.parametrize(
    ("earlier", "killed"),
    [
        (
            {"started": "", "ended": "stopped after step 5: SIGINT"},
            0,
        ),  # whose event went with the steps after 2
        (None, 0),  # a branch: what the other run said last is behind the step that it begins with
        ({"started": "", "ended": "ended without saying so: it was killed, or its machine went down"}, 1),
    ],
)
def test_a_start_whose_last_words_were_cut_off_with_later_steps_is_not_called_killed(earlier, killed):
    events = [
        {"step": 0, "kind": "start", "facts": {"earlier": None}},
        {"step": 2, "kind": "start", "facts": {"earlier": earlier}},
        {"step": 4, "kind": "end"},
    ]
    found = happened([{"step": 4}], events)
    assert (found.starts, found.killed) == (2, killed)
