"""Work that needs servers is done again after a sync, and ends the run with the reason when they are lost."""

import pytest

from megatron_laser.run.engines import NEEDS_WEIGHTS
from megatron_laser.run.ranks import CannotGoOn, Ranks


class Scripted(Ranks):
    """Ranks on which rank 0 says one word after the other."""

    def ask_controller(self, phase, work):
        self.config.append(phase)
        return work(self.controller)


def run_or_stop(words):
    left, did = list(words), []
    ranks = Scripted(config=did, runtime=None, coordinator=None, controller=left, stopping=None)
    ranks.run_or_stop("evaluation", 3, lambda controller: controller.pop(0), lambda: did.append("sync"))
    return did


def test_the_same_work_is_done_again_after_the_servers_were_given_weights():
    assert run_or_stop([""]) == ["evaluation"]
    assert run_or_stop([NEEDS_WEIGHTS, NEEDS_WEIGHTS, ""]) == ["evaluation", "sync"] * 2 + ["evaluation"]


def test_any_other_word_ends_the_run_behind_its_last_complete_step():
    with pytest.raises(CannotGoOn, match="server X is dead") as caught:
        run_or_stop([NEEDS_WEIGHTS, "server X is dead"])
    assert caught.value.step == 3
