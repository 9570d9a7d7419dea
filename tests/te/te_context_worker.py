"""Context parallelism of Transformer Engine on four gloo ranks; for test_te_context.py.

te_context_worker.py SOURCES FOLDER

One train step with tensor parallelism beside it, and the ring of keys and values alone, two and four ranks in it.
"""

import sys
from pathlib import Path

from helpers.torchrun import run_worker
from te_boot import boot
from te_cases import FOUR_RANK_CASES
from te_ring import extremes
from te_worker import begin, record_rings, rings, train_one_step


def main():
    sources, folder = (Path(argument) for argument in sys.argv[1:])
    boot(sources)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    record_rings()
    for name, case in FOUR_RANK_CASES.items():
        rings.clear()
        config, runtime = begin(folder, name, case)
        metrics = train_one_step(config, runtime)
        if runtime.is_main:
            torch.save({"metrics": metrics, "rings": list(rings)}, folder / f"{name}.pt")
    found = extremes([dist.new_subgroups(2)[0], dist.group.WORLD])
    if dist.get_rank() == 0:
        torch.save(found, folder / "ring.pt")
    dist.barrier()


if __name__ == "__main__":
    run_worker(main)
