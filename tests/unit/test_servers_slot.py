"""The states of a server's slot, driven by a clock."""

from megatron_laser.rollout.servers.slot import MAX_RESTARTS, WINDOW, Slot


def running(now=0.0):
    slot = Slot("server 0", start_deadline=100.0, hang_deadline=10.0)
    slot.started(now)
    assert slot.answered(now + 5.0)
    return slot


def test_it_is_started_once_and_is_ready_with_the_first_answer():
    slot = Slot("server 0", 100.0, 10.0)
    assert slot.due(0.0)
    slot.started(0.0)
    assert (slot.start, slot.state, slot.due(1.0)) == (1, "starting", False)
    assert slot.answered(5.0)
    assert not slot.answered(6.0)
    assert slot.state == "ready"


def test_a_start_may_take_its_deadline_and_no_longer():
    slot = Slot("server 0", 100.0, 10.0)
    slot.started(0.0)
    assert slot.problem(99.0, None) is None  # long past hang_deadline
    assert "start_deadline (100 s)" in slot.problem(101.0, None)


def test_silence_is_tolerated_up_to_the_deadline():
    slot = running()
    assert slot.problem(14.0, None) is None
    assert "is alive but gave no answer for 11 s" in slot.problem(16.0, None)
    slot.answered(15.9)
    assert slot.problem(16.0, None) is None


def test_a_paused_server_may_be_silent_as_long_as_an_update_may_take():
    slot = running()
    slot.update_deadline, slot.paused = 60.0, True
    assert slot.problem(64.0, None) is None
    assert (
        "gave no answer for 61 s (it is paused for an update, and rollout.sync_deadline is 60 s)"
        in slot.problem(66.0, None)
    )
    slot.paused = False
    assert "hang_deadline is 10 s" in slot.problem(16.0, None)
    slot.paused, slot.update_deadline = True, 5.0  # never less than hang_deadline
    assert slot.problem(14.0, None) is None


def test_the_end_of_the_process_is_seen_in_every_state():
    for slot in (running(), Slot("server 0", 100.0, 10.0)):
        slot.started(0.0)
        assert slot.problem(1.0, "was killed by SIGKILL") == "was killed by SIGKILL"


def test_restarts_wait_longer_each_time_and_end():
    slot, now, delays = running(), 10.0, []
    for _ in range(MAX_RESTARTS):
        slot.failed(now, "died")
        assert (slot.state, slot.due(now)) == ("restarting", False)
        delays.append(slot.retry_at - now)
        now = slot.retry_at
        assert slot.due(now)
        assert slot.problem(now, None) is None  # nothing is there to be wrong
        slot.started(now)
        slot.answered(now)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0]
    slot.failed(now, "died again")
    assert (slot.state, slot.reason, slot.due(now + 1e6)) == ("failed", "died again", False)
    assert slot.start == 1 + MAX_RESTARTS


def test_old_failures_are_forgotten():
    slot, now = running(), 0.0
    for _ in range(4 * MAX_RESTARTS):
        now += WINDOW / 2
        slot.failed(now, "died")
        assert slot.state == "restarting"
        slot.started(now + 2.0)
        slot.answered(now + 2.0)


def test_a_held_server_stays_held_while_it_answers():
    slot = running()
    slot.state = "held"
    assert not slot.answered(6.0)
    assert slot.state == "held"
    assert slot.problem(17.0, None) is not None
