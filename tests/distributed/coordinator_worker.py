"""Rank 0 of 2 as a process of its own, for test_coordinator.py, which plays rank 1 and hosts the store.

coordinator_worker.py PORT SCENARIO
"""

import sys
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_laser.distributed.coordinator import Coordinator


def busy(seconds):
    time.sleep(seconds)
    return "done working"


def fail():
    raise ValueError("the grading pool lost its workers")


def main():
    port, scenario = int(sys.argv[1]), sys.argv[2]
    timeout = timedelta(seconds=20)
    hosts = scenario == "hosts the store"
    store = dist.TCPStore("127.0.0.1", port, is_master=hosts, timeout=timeout, wait_for_workers=False)
    # A blocking wait holds its client's lock, and the heartbeat with it: the test's signals have their own.
    signals = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timeout)
    coordinator = Coordinator(dist.PrefixStore("run", store), 0, 2, deadline=3.0)
    if hosts:
        print(store.port, flush=True)
        coordinator.run_on_rank_zero("rollout of step 3", lambda: busy(60.0), deadline=60)
    elif scenario == "many phases":
        for number in range(40):
            assert coordinator.run_on_rank_zero(f"phase {number}", lambda n=number: n, deadline=60) == number
            signals.wait([f"seen {number}"], timedelta(seconds=60))
    elif scenario == "fails":
        try:
            coordinator.run_on_rank_zero("rollout of step 3", fail, deadline=60)
        except ValueError:
            signals.wait(["seen"], timedelta(seconds=60))
    else:
        seconds = {"works": 1.5, "hangs": 60.0}[scenario]
        assert (
            coordinator.run_on_rank_zero("rollout of step 3", lambda: busy(seconds), deadline=60)
            == "done working"
        )
        signals.wait(["seen"], timedelta(seconds=60))
    coordinator.close()


if __name__ == "__main__":
    main()
