"""What checkpoints of experts have besides: frozen routers under other layouts, and one more chain of layouts."""

import pytest
import torch
from test_checkpoint_layouts import DISTRIBUTED, assert_same, entry, prepared, run, stored

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true"]
LAYOUTS = {
    "expert 2, distributed": ["parallel.expert=2", DISTRIBUTED],
    "data 2": [],
    "pipeline 2": ["parallel.pipeline=2", "batching.tokens_per_micro_batch=160"],
    "tensor 2, sequence, distributed": [*SEQUENCE, DISTRIBUTED],
    "expert tensor 2": [*SEQUENCE, "parallel.expert_tensor=2"],
    "expert 2 within tensor 2, distributed": [*SEQUENCE, "parallel.expert=2", DISTRIBUTED],
}
CORE = ("expert 2, distributed", "pipeline 2", "expert tensor 2")


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        pytest.param(True, CORE, id="frozen routers, one of each kind"),
        pytest.param(True, tuple(LAYOUTS), id="frozen routers, all", marks=pytest.mark.long),
        pytest.param(False, tuple(LAYOUTS), id="trained routers, all", marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_from_layout_to_layout(tmp_path, frozen, names):
    folder = prepared(tmp_path, False, experts=True)
    extra = ("moe.freeze_router=true",) if frozen else ()
    (reference,) = run(folder, 1, [entry("one", save="one", extra=extra)])
    plan, before = [], "one"
    for name in names:
        plan.append(entry(name, load=before, save=name, extra=extra, layouts=LAYOUTS))
        before = name
    for name, figures in zip(names, run(folder, 2, plan), strict=True):
        assert_same(figures, reference, name)
    first, last = (stored(folder / "checkpoints" / name) for name in ("one", before))
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert torch.equal(last[name], tensor), name
    routers = [name for name in first if name.endswith("mlp.gate.weight") and name.startswith("optimizer")]
    assert bool(routers) != frozen
