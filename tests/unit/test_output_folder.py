"""The folder of a run: one live run at a time, one run for good, and nothing to do once it is finished."""

import json
import subprocess
import sys

import pytest
from helpers.runs import run_config
from helpers.torchrun import worker_environment

from megatron_laser.config import ConfigError
from megatron_laser.run import output_folder
from megatron_laser.run import output_folder as overwrite
from megatron_laser.run.output_folder import claim_output_folder, move_aside
from megatron_laser.trainer.checkpoint import folder as checkpoints
from megatron_laser.trainer.checkpoint import ownership

HOLD = """
import sys, time
from pathlib import Path
from megatron_laser.config import load_config
from megatron_laser.run.output_folder import claim_output_folder
held = claim_output_folder(load_config(Path(sys.argv[1]), []))
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path):
    def build(*overrides):
        return run_config(tmp_path, tmp_path / "model", *overrides)

    (tmp_path / "model").mkdir()
    return build


def contents(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.lock"
    }


def refused(config):
    with pytest.raises(ConfigError) as error:
        claim_output_folder(config)
    return str(error.value)


def test_a_folder_in_use_by_a_live_run_is_refused_and_free_once_that_run_is_killed(config, tmp_path):
    config()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "config.yaml")],
        env=worker_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "claimed\n"
        message = refused(config())
        assert f"{tmp_path / 'run'} is in use by a live run (process {holder.pid} on " in message
        assert message.endswith("stop it or choose another run.output_dir")
        with pytest.raises(ConfigError, match="in use by a live run"):
            move_aside(config())
    finally:
        holder.kill()
        holder.communicate()
    claim_output_folder(config()).release()


def test_a_folder_is_free_again_after_its_release(config):
    for _ in range(2):
        claim_output_folder(config()).release()


def test_a_run_that_may_not_resume_refuses_its_own_folder(config):
    claim_output_folder(config()).release()
    assert "already holds a run and run.resume is never" in refused(config("run.resume=never"))


def test_another_learning_rate_has_to_be_asked_for(config):
    claim_output_folder(config()).release()
    message = refused(config("optimizer.lr=2.0e-6"))
    assert (
        "other settings of what is learned: optimizer.lr 1e-06 there and 2e-06 here; pass --change" in message
    )
    claim_output_folder(config("optimizer.lr=2.0e-6"), change=True).release()


PREFIX = "{name: prefix, position: {every: 128}, target: prefix_value, weight: 0.05}"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("[{}, %s]", "[{}]", "laser.readouts[1] {'name': 'prefix', 'position': {'every': 128}, "),
        (
            "null",
            "[{}, %s]",
            "laser.readouts[1] None there and {'name': 'prefix', 'position': {'every': 128}, ",
        ),
        ("[{}]", "[{loss: bce}]", "laser.readouts[0].loss 'mse' there and 'bce' here;"),
        ("null", "[{weight: 0.2}]", "laser.readouts[0].weight 0.1 there and 0.2 here;"),
        ("[{weight: 0.2}]", "null", "what is learned: laser.alpha 0.2 there and 0.1 here;"),
        ("[{}]", "[{target: {group_shrunk: 0.9}}]", "target 'binary' there and {'group_shrunk': 0.9} here;"),
        ("[{}]", "[{tokens: 248}]", "laser.readouts[0].tokens [249] there and [248] here;"),
        ("[{position: before_eos}]", "[{}]", "laser.readouts[0].position 'before_eos' there and 'eos' here;"),
        ("[{}]", "[{warmup_steps: 7}]", "laser.readouts[0].warmup_steps 200 there and 7 here;"),
        ("[{}, {weight: 0.3}]", "[{}, {weight: 0.4}]", "laser.readouts[1].weight 0.3 there and 0.4 here;"),
    ],
)
def test_another_readout_is_refused_and_both_values_are_said(config, before, after, said):
    before, after = (text.replace("%s", PREFIX) for text in (before, after))
    claim_output_folder(config(f"laser.readouts={before}")).release()
    message = refused(config(f"laser.readouts={after}"))
    assert ("belongs to another run: laser." in message) != ("what is learned: laser." in message)
    assert said in message
    assert message.count(" there and ") == 1


def test_a_changed_setting_that_several_readouts_take_is_said_once(config):
    two = "laser.readouts=[{}, {name: again, tokens: 248, advantages: none}]"
    claim_output_folder(config(two)).release()
    message = refused(config(two, "laser.beta=0.5"))
    assert "another run: laser.beta 0.4 there and 0.5 here;" in message
    other = "laser.readouts=[{}, {name: again, tokens: 248, advantages: none, beta: 0.5}]"
    assert "another run: laser.readouts[1].beta 0.4 there and 0.5 here;" in refused(config(other))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["laser.readouts=[{}]"]),
        (["laser.readouts=[{}]"], []),
        (["laser.alpha=0.2", "laser.loss=mse"], ["laser.readouts=[{weight: 0.2}]"]),
        (["laser.readouts=[{tokens: 249, position: eos, advantages: mix}]"], []),
        (["laser.reasoning_warmup_steps=5"], ["laser.readouts=[{warmup_steps: 5, name: readout_1}]"]),
        ([], ["laser.readouts=[{name: score}]"]),
    ],
)
def test_readouts_that_come_to_the_same_are_the_same_run_however_written(config, before, after):
    claim_output_folder(config(*before)).release()
    claim_output_folder(config(*after)).release()


def test_what_readouts_do_not_make_up_is_compared_as_ever_beside_a_list(config):
    claim_output_folder(config("laser.readouts=[{}]")).release()
    assert "what is learned: laser.score_source 'trainer' there and 'server' here;" in refused(
        config("laser.score_source=server")
    )
    assert "laser.enabled True there and False here" in refused(config("laser.enabled=false"))


def test_a_run_that_was_recorded_before_there_were_readouts_goes_on_with_an_empty_entry(config, tmp_path):
    claim_output_folder(config()).release()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["settings"]["laser.readouts"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    claim_output_folder(config("laser.readouts=[{}]")).release()
    assert "laser.alpha 0.1 there and 0.3 here" in refused(config("laser.alpha=0.3"))


def test_another_layout_is_the_same_run(config):
    claim_output_folder(config()).release()
    claim_output_folder(config("parallel.tensor=2", "batching.tokens_per_micro_batch=512")).release()


def test_other_servers_are_the_same_run_and_so_they_are_to_a_run_that_was_recorded_before(config, tmp_path):
    claim_output_folder(config()).release()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["settings"]["rollout.sglang"] = {"urls": ["http://10.0.0.5:30000"]}  # as earlier versions did
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    claim_output_folder(config("rollout.sglang.servers=2", "rollout.min_servers=2")).release()
    assert "rollout.temperature 1.0 there and 0.5 here" in refused(config("rollout.temperature=0.5"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", '{"settings": 3}', '{"settings": {"odd": 1}}'),
        '{"settings": {}, "undo": [{"step": "two", "settings": {}}]}',
    ],
)
def test_a_record_that_is_none_is_named(config, tmp_path, text):
    claim_output_folder(config()).release()
    (tmp_path / "run" / "run.json").write_text(text)
    assert f"{tmp_path / 'run' / 'run.json'} cannot be read" in refused(config())


def test_metrics_without_a_run_are_not_overwritten(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "holds metrics of an unknown run" in refused(config())


def test_a_finished_run_is_told_apart_and_left_as_it_is(config, tmp_path, caplog):
    folder = claim_output_folder(config())
    assert not folder.finished
    folder.mark_finished(3)
    folder.release()
    before = contents(tmp_path / "run")
    again = claim_output_folder(config())
    assert again.finished
    again.release()
    assert contents(tmp_path / "run") == before
    assert f"the run in {tmp_path / 'run'} has finished its 3 steps: nothing to do" in caplog.text


def test_a_finished_run_goes_on_to_more_steps_from_its_checkpoint(config, tmp_path):
    folder = claim_output_folder(config())
    folder.mark_finished(3)
    folder.release()
    partial = checkpoints.partial_folder(tmp_path / "run" / "checkpoints", 3)
    partial.mkdir(parents=True)
    checkpoints.publish(partial, {"step": 3}, {})
    longer = claim_output_folder(config("run.steps=5"))
    assert not longer.finished
    longer.release()
    assert not (tmp_path / "run" / "FINISHED").exists()


def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(config):
    folder = claim_output_folder(config())
    folder.mark_finished(3)
    folder.release()
    assert "holds a finished run of 3 steps and" in refused(config("run.steps=5"))


def test_a_folder_that_cannot_be_written_is_a_user_error(config, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert "run.output_dir" in refused(config())
    assert "cannot be written" in refused(config())


def test_moving_aside_counts_up(config, tmp_path):
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (moved,) = move_aside(config())
        assert (moved.what, moved.to) == (str(tmp_path / "run"), tmp_path / f"run.old-{number}")
    assert move_aside(config()) == []


def test_a_linked_folder_is_claimed_and_moved_aside_where_it_lies(config, tmp_path):
    """The link leads to a larger disk: the new run must not begin on the small one."""
    (tmp_path / "run").symlink_to(tmp_path / "large" / "run")  # where nothing is yet
    claim_output_folder(config()).release()
    assert (tmp_path / "large" / "run" / "run.json").exists()
    (moved,) = move_aside(config())
    assert moved.to == tmp_path / "large" / "run.old-1"
    claim_output_folder(config()).release()
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "large" / "run" / "run.json").exists()


def test_a_folder_that_cannot_be_moved_aside_is_a_user_error(config, monkeypatch):
    claim_output_folder(config()).release()

    def busy(*arguments):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(overwrite.os, "replace", busy)
    with pytest.raises(ConfigError, match=r"cannot be moved aside .*busy"):
        move_aside(config())


def test_two_live_runs_do_not_send_weights_through_one_folder(config, tmp_path):
    """Each deletes what is not its newest there."""
    settings = [
        "rollout.engine=sglang",
        "rollout.weight_sync=disk",
        f"rollout.sync_folder={tmp_path / 'sync'}",
    ]
    held = claim_output_folder(config(*settings))
    other = config(*settings, f"run.output_dir={tmp_path / 'other'}")
    assert f"rollout.sync_folder {tmp_path / 'sync'} is in use by a live run" in refused(other)
    held.release()
    claim_output_folder(other).release()


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("run/config.yaml", "run.output_dir {0}/run"),
        ("run/run.json", "run.output_dir {0}/run"),
        ("shared/owner.json", "checkpoint.folder {0}/shared"),
    ],
)
def test_a_write_that_fails_is_said_of_the_folder_that_it_was_for(
    config, tmp_path, monkeypatch, file, setting
):
    where = tmp_path / file
    for module in (output_folder, ownership):
        real = module.write_atomically

        def write(path, text, real=real):
            if path == where:
                raise OSError(28, "No space left on device")
            real(path, text)

        monkeypatch.setattr(module, "write_atomically", write)
    if file == "run/config.yaml":
        where.mkdir(parents=True)
    message = refused(config(f"checkpoint.folder={tmp_path / 'shared'}"))
    assert f"- {setting.format(tmp_path)} cannot be written" in message


def test_a_setting_that_an_earlier_version_did_not_have_is_as_it_was_by_default(config):
    claimed = claim_output_folder(config())
    file = claimed.path / ownership.RUN
    claimed.release()
    record = json.loads(file.read_text())
    assert "moe.aux_loss_coefficient" in record["settings"]
    record["settings"] = {
        key: value for key, value in record["settings"].items() if not key.startswith("moe.")
    }
    file.write_text(json.dumps(record))
    claim_output_folder(config()).release()
    message = refused(config("moe.aux_loss_coefficient=0.1"))
    assert "moe.aux_loss_coefficient 0.0 there and 0.1 here" in message
