"""`megatron_laser train` whose process is killed while servers are paused in the weight sync of a step.

dying_in_sync.py STEP RUN.yaml [OVERRIDES]

It dies when the first bucket of weights is on its way: servers are paused, with an update session open.
"""

import os
import signal
import sys

from megatron_laser.cli import app
from megatron_laser.weight_sync.distributed import DistributedTransport


def main():
    step, *command = sys.argv[1:]
    wait_for = DistributedTransport._wait_for

    def dying(self, update, flight):
        if update.label.endswith(f"-{step}"):
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(self, update, flight)

    DistributedTransport._wait_for = dying
    app(["train", *command])


if __name__ == "__main__":
    main()
