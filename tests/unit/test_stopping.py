"""What a run says of its end in status.json, and to a signal near its end."""

import pytest
from helpers.claimed import configurations

from megatron_laser.run.output_folder import claim_output_folder
from megatron_laser.run.status import read_status
from megatron_laser.run.stop_signals import answering_signals
from megatron_laser.run.stopping import Stopping
from megatron_laser.run.time_limit import TimeLimit


@pytest.fixture
def stopping(tmp_path):
    """Of a run whose epochs are still to be made into steps."""
    of = configurations(tmp_path)
    config = of("run", "run.steps=null", "run.epochs=2", "run.time_limit=600")
    folder = claim_output_folder(config)
    with answering_signals(speaks=False) as signals:
        made = Stopping(config, signals)
        made.settled(8)
        made.open(folder, 1)
        made.resumed(None)
        yield made
        made.finished()  # safe to call twice
    folder.release()


def test_with_epochs_status_and_time_limit_know_the_steps_that_they_have_become(
    stopping, tmp_path, monkeypatch
):
    assert read_status(tmp_path / "run").steps == 8
    monkeypatch.setattr(TimeLimit, "has_room", lambda *_, **__: False)  # for another step, and none is left
    stopping.recorded(8)
    stopping.check_limit(8, evaluation=False)
    assert not stopping.signals.reason
    stopping.finished()
    said = read_status(tmp_path / "run")
    assert (said.state, said.step, said.steps) == ("finished", 8, 8)


def test_a_run_that_has_ended_early_does_not_claim_the_steps_that_it_left_out(stopping, tmp_path):
    stopping.running(lambda: True)
    stopping.recorded(5)
    stopping.enter("final evaluation")
    assert stopping.signals.describe() == (
        "the run has ended early, after step 5 of 8, and is saved; stopping in the final evaluation"
    )
    stopping.finished()
    assert read_status(tmp_path / "run").step == 5
