"""Whole runs on one process: stopped, resumed, finished; every time as if nothing had happened."""

import json
import os
import signal

import pytest
from helpers.documented import undocumented
from helpers.tiny_run import metrics_without_times, write_tiny_run
from helpers.whole_runs import after_recording, checkpoint_digests, run

from megatron_laser.config import ConfigError, load_config
from megatron_laser.data import DataError
from megatron_laser.evaluation.responses import SavedResponse, partial_responses_path
from megatron_laser.loop import train
from megatron_laser.observability.metrics_logger import read_metrics
from megatron_laser.observability.rates import VARYING
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.run.status import read_status
from megatron_laser.trainer.checkpoint import folder as folders
from megatron_laser.trainer.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(YAML file, output folder) of a run of 4 steps in one go."""
    file = write_tiny_run(tmp_path_factory.mktemp("run"))
    return file, train(load_config(file, ["run.output_dir=" + str(file.parent / "undisturbed")]))


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_run_learns_something_that_could_be_lost(undisturbed):
    _, folder = undisturbed
    lines = metrics_without_times(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert len({line.get("self_reward_loss", line.get("self_reward_error")) for line in lines}) == 4
    assert [step for step, _ in folders.published(folder / "checkpoints")] == [2, 4]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_run_stopped_by_a_signal_saves_and_continues_bitwise(
    undisturbed, tmp_path, monkeypatch, capsys, name
):
    file, expected = undisturbed
    with monkeypatch.context() as patch:
        after_recording(patch, 3, lambda: os.kill(os.getpid(), getattr(signal, name)))
        run(file, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "STOPPED").read_text()) == {"step": 3, "reason": name}
    assert f"stopped after step 3 ({name}); saved" in capsys.readouterr().out
    assert not (tmp_path / "out" / "FINISHED").exists()
    run(file, tmp_path / "out")
    assert not (tmp_path / "out" / "STOPPED").exists()
    status = read_status(tmp_path / "out")
    assert (status.state, status.exit_status, status.step, status.checkpoint) == ("finished", 0, 4, 4)
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)
    assert checkpoint_digests(tmp_path / "out", 4) == checkpoint_digests(expected, 4)


def test_evaluation_moves_nothing_of_training_and_a_resumed_run_evaluates_to_the_same_numbers(
    undisturbed, tmp_path, monkeypatch
):
    file, expected = undisturbed
    problems = tmp_path / "validation.jsonl"
    problems.write_text("".join(f'{{"problem": "{i} + 7 ?", "answer": "{i + 7}"}}\n' for i in range(6)))
    settings = [f"data.validation={problems}", "evaluation.every=1"]
    settings += ["evaluation.max_prompts=4", "evaluation.samples_per_prompt=2"]
    run(file, tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        after_recording(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, tmp_path / "stopped", *settings)
    run(file, tmp_path / "stopped", *settings)
    whole = metrics_without_times(tmp_path / "whole")
    assert metrics_without_times(tmp_path / "stopped") == whole
    trained = [
        {name: value for name, value in line.items() if not name.startswith("eval/")} for line in whole
    ]
    assert trained == metrics_without_times(expected)
    for step in range(1, 5):
        name = f"evaluation/validation_step_{step}.jsonl"
        records = [json.loads(line) for line in (tmp_path / "whole" / name).read_text().splitlines()]
        assert [record["row"] for record in records] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_rollout_that_a_signal_cuts_off_is_made_again_bitwise(undisturbed, tmp_path, monkeypatch, capsys):
    file, expected = undisturbed
    with monkeypatch.context() as patch:
        decode, seen = InProcessEngine.decode, []

        def patched(self, *arguments):
            if self.version == 2 and len(seen) < 3:  # the third token of step 3
                seen.append(0)
                if len(seen) == 3:
                    os.kill(os.getpid(), signal.SIGINT)
            return decode(self, *arguments)

        patch.setattr(InProcessEngine, "decode", patched)
        run(file, tmp_path / "out", "checkpoint.every=4")
    assert read_status(tmp_path / "out").step == 2 and len(seen) == 3
    assert [step for step, _ in folders.published(tmp_path / "out" / "checkpoints")] == [2]
    assert "SIGINT: stopping after step 2, saving (now: rollout of step 3)" in capsys.readouterr().out
    run(file, tmp_path / "out")
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)
    assert checkpoint_digests(tmp_path / "out", 4) == checkpoint_digests(expected, 4)


def on_arrival(monkeypatch, number, action):
    """Call `action` when the evaluations' response `number`, from 1, comes in."""
    of, seen = SavedResponse.of, []

    def patched(*arguments):
        seen.append(arguments)
        if len(seen) == number:
            action()
        return of(*arguments)

    monkeypatch.setattr(SavedResponse, "of", staticmethod(patched))
    return seen


def test_a_signal_in_the_final_evaluation_ends_it_at_once_and_the_same_command_goes_on_there(
    undisturbed, tmp_path, monkeypatch, capsys
):
    file, _ = undisturbed
    problems = tmp_path / "test.jsonl"
    problems.write_text("".join(f'{{"problem": "{i} + 7 ?", "answer": "{i + 7}"}}\n' for i in range(6)))
    settings = [f"data.test={problems}", "run.steps=1", "evaluation.final_samples_per_prompt=4"]
    # three calls of the engine, whose responses do not end all at once
    settings += ["rollout.max_batch_size=8", "evaluation.max_new_tokens=40"]
    whole = run(file, tmp_path / "whole", *settings)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        # the second response of the second call; each of the first call's eight is seen once more at its end
        on_arrival(patch, 2 * 8 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, stopped, *settings)
    (partial,) = (stopped / "evaluation").glob("test_step_1.*.partial")
    kept = {(line["row"], line["sample"]) for line in map(json.loads, partial.read_text().splitlines())}
    assert 10 <= len(kept) < 16
    assert json.loads((stopped / "STOPPED").read_text()) == {"step": 1, "reason": "SIGTERM"}
    assert "stopped after step 1 (SIGTERM); saved" in capsys.readouterr().out
    assert not (stopped / "FINISHED").exists()
    assert not (stopped / "evaluation" / "test_step_1.json").exists()
    with monkeypatch.context() as patch:
        seen = on_arrival(patch, 0, lambda: None)
        run(file, stopped, *settings)
        everything = {(row, sample) for row in range(6) for sample in range(4)}
        assert {(row, sample) for row, sample, _ in seen} == everything - kept
    for name in ("test_step_1.json", "test_step_1.jsonl"):
        assert (stopped / "evaluation" / name).read_bytes() == (whole / "evaluation" / name).read_bytes()
    assert not list((stopped / "evaluation").glob("*.partial")) and (stopped / "FINISHED").exists()


def test_responses_of_a_stopped_final_evaluation_are_not_those_of_other_weights(tmp_path):
    """Kept under the weights' own digest: a run that comes to the same step with other weights answers anew."""
    ours = partial_responses_path(tmp_path / "test_step_4.jsonl", {"weights": "sha256:1"})
    ours.write_text("")
    (tmp_path / "test_step_14.0.partial").write_text("")
    assert partial_responses_path(tmp_path / "test_step_4.jsonl", {"weights": "sha256:1"}).exists()
    assert not partial_responses_path(tmp_path / "test_step_4.jsonl", {"weights": "sha256:2"}).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["test_step_14.0.partial"]


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(undisturbed, tmp_path, monkeypatch):
    file, _ = undisturbed
    problems = tmp_path / "validation.jsonl"
    problems.write_text("".join(f'{{"problem": "{i} + 7 ?", "answer": "{i + 7}"}}\n' for i in range(4)))
    settings = [f"data.validation={problems}", "evaluation.every=1", "run.steps=2"]
    run(file, tmp_path / "whole", *settings)
    for _ in range(2):  # the second one in the evaluation that makes up for it
        with monkeypatch.context() as patch:
            on_arrival(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            run(file, tmp_path / "stopped", *settings)
        assert json.loads((tmp_path / "stopped" / "STOPPED").read_text())["step"] == 1
    assert not (tmp_path / "stopped" / "evaluation" / "validation_step_1.json").exists()
    run(file, tmp_path / "stopped", *settings)
    without_times = [
        [
            {name: value for name, value in row.items() if not name.startswith(VARYING)}
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("stopped", "whole")
    ]
    assert without_times[0] == without_times[1]


def test_a_signal_in_the_evaluation_before_the_first_step_ends_the_run_there(
    undisturbed, tmp_path, monkeypatch
):
    file, _ = undisturbed
    problems = tmp_path / "test.jsonl"
    problems.write_text("".join(f'{{"problem": "{i} + 7 ?", "answer": "{i + 7}"}}\n' for i in range(4)))
    settings = [f"data.test={problems}", "evaluation.baseline=true", "evaluation.every=0", "run.steps=1"]
    settings += ["evaluation.final_samples_per_prompt=2"]
    with monkeypatch.context() as patch:
        on_arrival(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, tmp_path / "out", *settings)
    assert json.loads((tmp_path / "out" / "STOPPED").read_text())["step"] == 0
    run(file, tmp_path / "out", *settings)
    found = {path.name for path in (tmp_path / "out" / "evaluation").glob("*.json")}
    assert found == {"test_step_0.json", "test_step_1.json"}
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert undocumented(key for row in rows for key in row) == []


def test_evaluations_of_steps_that_are_trained_again_are_dropped(undisturbed, tmp_path, monkeypatch):
    file, _ = undisturbed
    after_recording(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(file, tmp_path / "out")
    evaluation = tmp_path / "out" / "evaluation"
    evaluation.mkdir(exist_ok=True)
    for name in ("validation_step_1.json", "validation_step_3.json", "validation_step_3.jsonl"):
        (evaluation / name).write_text("{}")
    after_recording(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(file, tmp_path / "out")
    assert [path.name for path in evaluation.iterdir()] == ["validation_step_1.json"]


def test_a_run_that_dies_between_two_checkpoints_repeats_the_lost_steps_bitwise(
    undisturbed, tmp_path, monkeypatch
):
    file, expected = undisturbed
    for dies_in in (2, 4):  # before the first checkpoint, and with one step after it recorded
        with monkeypatch.context() as patch:
            step = Trainer.train_step

            def dying(self, flat, number, dies_in=dies_in, step=step):
                if number == dies_in:
                    raise KeyboardInterrupt
                return step(self, flat, number)

            patch.setattr(Trainer, "train_step", dying)
            with pytest.raises(KeyboardInterrupt):
                run(file, tmp_path / "out")
        status = read_status(tmp_path / "out")
        assert (status.state, status.exit_status, status.step) == ("failed", 130, dies_in - 1)
    run(file, tmp_path / "out")
    assert metrics_without_times(tmp_path / "out") == metrics_without_times(expected)
    assert checkpoint_digests(tmp_path / "out", 4) == checkpoint_digests(expected, 4)


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, caplog):
    file, folder = undisturbed
    before = contents(folder)
    assert run(file, folder) == folder
    assert "has finished its 4 steps: nothing to do" in caplog.text
    assert contents(folder) == before


def test_another_run_does_not_take_over_a_shared_folder_of_checkpoints(undisturbed, tmp_path):
    file, first = undisturbed
    shared = f"checkpoint.folder={first / 'checkpoints'}"
    with pytest.raises(ConfigError, match=rf"belongs to another run, that of {first}"):
        run(file, tmp_path / "second", shared)
    assert not (tmp_path / "second" / "metrics.jsonl").exists()
    owner = json.loads((first / "run.json").read_text())["id"]
    states = [folders.read_state(path) for _, path in folders.published(first / "checkpoints")]
    assert [state["run"]["owner"]["id"] for state in states] == [owner, owner]


def test_everybody_reads_what_a_run_writes_whom_the_umask_lets(undisturbed):
    _, folder = undisturbed
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {path: oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys(
        files, oct(0o666 & ~mask)
    )


def test_other_data_under_the_same_name_are_refused(tmp_path):
    file = write_tiny_run(tmp_path)
    run(file, tmp_path / "out", "run.steps=2")
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(reversed(rows)))
    with pytest.raises(DataError, match="the saved data cursor belongs to another run over the data"):
        run(file, tmp_path / "out", "run.steps=3")
    status = read_status(tmp_path / "out")
    assert (status.state, status.exit_status, status.step, status.checkpoint) == ("failed", 2, 2, 2)
    assert status.reason.startswith("the saved data cursor belongs to another run")


DRIFT = ["laser.drift_every=1", "laser.drift_samples=6", "checkpoint.every=2", "run.steps=3"]


def drift_of(folder):
    return [
        {key: value for key, value in line.items() if key.startswith("drift/")}
        for line in metrics_without_times(folder)
    ]


def test_a_resumed_run_measures_drift_on_the_same_responses_and_says_where_it_cannot(
    undisturbed, tmp_path, monkeypatch, caplog
):
    file, _ = undisturbed
    whole = run(file, tmp_path / "whole", *DRIFT)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        after_recording(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(file, stopped, *DRIFT)
    held = (stopped / "held_responses.npz").read_bytes()

    (stopped / "held_responses.npz").write_bytes(held[:-40])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__init__", lambda *_, **__: pytest.fail("a model was built"))
        with pytest.raises(DataError, match=r"held_responses\.npz cannot be read .*delete it, and the run"):
            run(file, stopped, *DRIFT)

    (stopped / "held_responses.npz").write_bytes(held)
    run(file, stopped, *DRIFT)
    assert metrics_without_times(stopped) == metrics_without_times(whole)
    found = drift_of(whole)
    assert [line["drift/held_step"] for line in found] == [1.0, 1.0, 1.0]
    assert len({line["drift/shift"] for line in found}) == 3

    # Another number of steps between measurements is no other run; without the file responses are taken again.
    (stopped / "held_responses.npz").unlink()
    caplog.clear()
    with pytest.raises(ConfigError, match=r"laser\.beta"):
        run(file, stopped, *DRIFT, "run.steps=4", "laser.beta=0.6")
    run(file, stopped, *DRIFT, "run.steps=4", "laser.drift_every=2")
    assert drift_of(stopped)[3]["drift/held_step"] == 4.0
    assert "counts from the weights before step 4" in caplog.text
