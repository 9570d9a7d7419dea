"""A checkpoint is saved under one parallel layout and resumed under another.

One layout of each kind, in each direction; all of them, in more pairs, are `long`.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.torchrun import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from compare_layouts import make_model, settings

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("checkpoint_layouts_worker.py")
SMALL = "batching.tokens_per_micro_batch=160"
DISTRIBUTED = "optimizer.distributed=true"
LAYOUTS = {
    "tensor 2": ["parallel.tensor=2"],
    "tensor 2, sequence, padded": ["parallel.tensor=2", "parallel.sequence=true", "model.vocab_multiple=32"],
    "pipeline 2": ["parallel.pipeline=2", SMALL],
    "pipeline 2, virtual 2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", SMALL],
    "pipeline 2 of 1 and 3 layers, offloaded": [
        "parallel.pipeline=2",
        "parallel.stage_layers=[1, 3]",
        "optimizer.offload=true",
        SMALL,
    ],
    "data 2, distributed, offloaded": [DISTRIBUTED, "optimizer.offload=true"],
    "context 2": ["parallel.context=2"],
    "context 2, distributed": ["parallel.context=2", DISTRIBUTED],
    "data 2": [],
    "data 2, distributed": [DISTRIBUTED],
    "data 2, overlapped": [
        DISTRIBUTED,
        "optimizer.overlap_grad_reduce=true",
        "optimizer.overlap_param_gather=true",
    ],
}
PAIRS = [
    ("tensor 2", "pipeline 2, virtual 2"),
    ("pipeline 2, virtual 2", "data 2, distributed"),
    ("data 2, distributed", "tensor 2, sequence, padded"),
    ("tensor 2, sequence, padded", "pipeline 2"),
    ("data 2, overlapped", "data 2"),
    ("context 2, distributed", "pipeline 2"),
    ("tensor 2", "context 2"),
    ("pipeline 2 of 1 and 3 layers, offloaded", "data 2, distributed, offloaded"),
]
CORE = ("tensor 2, sequence, padded", "pipeline 2, virtual 2", "context 2, distributed", "data 2, overlapped")
EXPERT_LAYOUTS = {
    "data 2": [],
    "data 2, distributed": [DISTRIBUTED],
    "expert 2": ["parallel.expert=2"],
    "expert 2, distributed": ["parallel.expert=2", DISTRIBUTED],
    "expert 2 within tensor 2": ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"],
    "expert tensor 2": [
        "parallel.tensor=2",
        "parallel.sequence=true",
        "parallel.expert_tensor=2",
        DISTRIBUTED,
    ],
    "pipeline 2, virtual 2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", SMALL],
    "expert 2 within context 2": ["parallel.context=2", "parallel.expert=2", DISTRIBUTED],
}
EXPERT_PAIRS = [
    ("expert 2, distributed", "expert tensor 2"),
    ("expert tensor 2", "expert 2 within context 2"),
    ("expert 2 within context 2", "pipeline 2, virtual 2"),
    ("pipeline 2, virtual 2", "expert 2"),
    ("expert 2 within tensor 2", "data 2, distributed"),
]
EXPERT_CORE = ("expert 2, distributed", "expert tensor 2", "pipeline 2, virtual 2")
long = pytest.mark.long


def entry(layout, *, load=None, save=None, extra=(), layouts=LAYOUTS):
    return {"layout": [*layouts.get(layout, []), *extra], "load": load, "save": save}


def run(folder, processes, plan):
    """The figures of step 3 for each entry of the plan."""
    plan_file, output = folder / f"plan{processes}.json", folder / f"figures{processes}.json"
    plan_file.write_text(json.dumps(plan))
    run_ranks(WORKER, processes, folder, plan_file, output, timeout=240)
    return json.loads(output.read_text())


def assert_same(figures, reference, name):
    for key, expected in reference.items():
        assert abs(figures[key] - expected) <= 1e-5 * abs(expected) + 1e-7, (
            name,
            key,
            figures[key],
            expected,
        )


def prepared(tmp_path, tied, experts=False):
    make_model(tmp_path, tied, experts)
    (tmp_path / "config.yaml").write_text(settings(tmp_path, experts=experts))
    return tmp_path


@pytest.mark.parametrize(
    ("layouts", "tied"),
    [
        pytest.param(CORE, True, id="tied, one of each kind"),
        pytest.param(tuple(LAYOUTS), True, id="tied, all", marks=long),
        pytest.param(tuple(LAYOUTS), False, id="untied, all", marks=long),
    ],
)
def test_the_step_after_resuming_is_the_same_under_every_layout(tmp_path, layouts, tied):
    pairs = PAIRS if len(layouts) == len(LAYOUTS) else chain(CORE)
    resume_everywhere(prepared(tmp_path, tied), LAYOUTS, layouts, pairs)


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(EXPERT_CORE, id="one of each kind"),
        pytest.param(tuple(EXPERT_LAYOUTS), id="all", marks=long),
    ],
)
def test_the_step_after_resuming_is_the_same_under_every_layout_of_experts(tmp_path, layouts):
    pairs = EXPERT_PAIRS if len(layouts) == len(EXPERT_LAYOUTS) else chain(EXPERT_CORE)
    resume_everywhere(prepared(tmp_path, False, experts=True), EXPERT_LAYOUTS, layouts, pairs)


def chain(names):
    """From each layout to the next, and from the last to the first."""
    return list(zip(names, (*names[1:], names[0])))


def resume_everywhere(folder, layouts, names, pairs):
    """To each of the layouts `names` from one process and back, and from one to another as `pairs` say."""

    def plan_of(name, **settings):
        return entry(name, layouts=layouts, **settings)

    (reference,) = run(folder, 1, [entry("one", save="one")])
    plan = [plan_of(name, load="one") for name in names]
    plan += [plan_of(name, save=name) for name in names]
    plan += [plan_of(there, load=here) for here, there in pairs]
    said = [f"one -> {name}" for name in names] + list(names) + [" -> ".join(pair) for pair in pairs]
    for name, figures in zip(said, run(folder, 2, plan), strict=True):
        assert_same(figures, reference, name)
    for name, figures in zip(names, run(folder, 1, [entry("one", load=name) for name in names])):
        assert_same(figures, reference, f"{name} -> one")


def stored(folder):
    """All tensors of the checkpoint in `folder`, vocabulary padding cut off."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    (path,) = folder.glob("step_*")
    reader = dcp.FileSystemReader(path)
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in reader.read_metadata().state_dict_metadata.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {
        name: tensor[:90] if "embed" in name or "lm_head" in name else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("tied", "layouts", "names"),
    [
        pytest.param(False, LAYOUTS, CORE, id="untied, one of each kind"),
        pytest.param(False, EXPERT_LAYOUTS, EXPERT_CORE, id="experts, one of each kind"),
        pytest.param(False, LAYOUTS, tuple(LAYOUTS), id="untied, all", marks=long),
        pytest.param(True, LAYOUTS, tuple(LAYOUTS), id="tied, all", marks=long),
        pytest.param(False, EXPERT_LAYOUTS, tuple(EXPERT_LAYOUTS), id="experts, all", marks=long),
    ],
)
def test_bf16_weights_and_fp32_optimizer_state_pass_through_all_layouts_unchanged(
    tmp_path, tied, layouts, names
):
    folder = prepared(tmp_path, tied, experts=layouts is EXPERT_LAYOUTS)
    bf16 = ("model.dtype=bfloat16",)
    plan, before = [], None
    for name in names:
        plan.append(entry(name, load=before, save=name, extra=bf16, layouts=layouts))
        before = name
    run(folder, 2, plan)
    first, *others = (stored(folder / "checkpoints" / name) for name in names)
    kinds = {name.split(".model")[0].split(".lm_head")[0] for name in first}
    assert kinds == {"weights", "optimizer.main_param", "optimizer.exp_avg", "optimizer.exp_avg_sq"}
    assert first["optimizer.main_param.model.norm.weight"].dtype == torch.float32
    for name, tensors in zip(names[1:], others, strict=True):
        assert tensors.keys() == first.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, first[key]), (name, key)
