"""Checksums of experts: what a server's fused parameters hold, made of matrices that come one by one in any order."""

import pytest
import torch
from helpers.fake_fleet import FakeEngine
from helpers.models import disk_tensors, tiny_model
from test_weight_update import update

from megatron_laser.rollout.server_weights import expert_storage
from megatron_laser.weight_sync.checksums import Checks, ServerLayout, StreamDigest
from megatron_laser.weight_sync.hashes import Sha256, TileSums

EXPERTS = 8
FAMILIES = {
    "qwen3-moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj", "mlp.gate.weight"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2", "block_sparse_moe.gate.weight"),
}


def streamed(weights, ranks):
    """A folder's tensors in the order of an export by `ranks` expert-parallel ranks: one expert of each together."""
    per_rank = EXPERTS // ranks

    def place(item):
        position, name = item
        layer, _, rest = name.partition(".experts.")
        if not rest:
            return (position, 0, 0)
        first = names.index(next(other for other in names if other.startswith(f"{layer}.experts.")))
        expert = int(rest.split(".")[0])
        return (first, expert % per_rank, expert // per_rank)

    names = list(weights)
    return [(name, weights[name]) for _, name in sorted(enumerate(names), key=place)]


def server_parameters(weights, family, size, rank):
    """The experts' parameters of a rank of SGLang 0.5.23, as its loaders fill them."""
    module, gate, up, down, _ = FAMILIES[family]
    found = {}
    for layer in range(4):
        prefix = f"model.layers.{layer}.{module}"

        def part(expert, name, dim, prefix=prefix):
            return weights[f"{prefix}.{expert}.{name}.weight"].chunk(size, dim=dim)[rank]

        found[f"{prefix}.w13_weight"] = torch.stack(
            [torch.cat([part(e, gate, 0), part(e, up, 0)]) for e in range(EXPERTS)]
        )
        found[f"{prefix}.w2_weight"] = torch.stack([part(e, down, 1) for e in range(EXPERTS)])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("on_cpu", [True, False], ids=["sha256", "tile sums"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_servers_experts_are_known_from_the_stream_of_any_layout(family, ranks, on_cpu, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in disk_tensors(tiny_model(family)).items()}
    order = streamed(weights, ranks)
    assert sorted(name for name, _ in order) == sorted(weights)
    assert ranks == 1 or [name for name, _ in order] != list(weights)
    digest = StreamDigest(on_cpu=on_cpu, sizes=(1, 2), layout=ServerLayout(heads=4))
    for _ in digest.watch(order):
        pass
    assert digest.has_experts
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        sums = digest.sums(size, rank)
        for name, tensor in server_parameters(weights, family, size, rank).items():
            whole = Sha256() if on_cpu else TileSums()
            whole.add(tensor)
            assert sums.pop(name) == whole.hexdigest(), (size, rank, name)
        assert not [name for name in sums if ".experts." in name]
        assert f"model.layers.0.{FAMILIES[family][4]}" in sums


def test_one_expert_that_a_server_did_not_take_is_found():
    weights = disk_tensors(tiny_model("qwen3-moe"))
    engine, digest = FakeEngine(2), StreamDigest(on_cpu=True)
    list(digest.watch(weights.items()))
    stale = StreamDigest(on_cpu=True)
    old = "model.layers.2.mlp.experts.5.down_proj.weight"
    list(stale.watch({**weights, old: weights[old] * 2}.items()))
    engine.servers[0].sums, engine.servers[1].sums = digest.sums(), stale.sums()
    made = update(engine, check=digest)
    assert [member.url for member in made.members] == ["http://s0"]
    assert "model.layers.2.mlp.experts.w2_weight: " in made.failures[0]


def test_experts_that_a_server_keeps_in_another_order_are_compared_between_servers_and_that_is_said(caplog):
    weights = disk_tensors(tiny_model("mixtral"))
    engine, digest = FakeEngine(3), StreamDigest(on_cpu=True)
    list(digest.watch(weights.items()))
    for server, value in zip(engine.servers, ("1" * 16, "1" * 16, "2" * 16)):
        server.sums = {
            name: value if ".experts." in name else theirs for name, theirs in digest.sums().items()
        }
    for member in engine.fleet.members:
        member.expert_storage = "ep_size 4"
    made = update(engine, check=digest, checks=Checks(always=True))
    assert [member.url for member in made.members] == ["http://s0", "http://s1"]
    assert "differ from those of http://s0" in made.failures[0]
    assert caplog.text.count("experts of servers are not compared") == 1 and "ep_size 4" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ""),
        (
            {"ep_size": 1, "moe_runner_backend": "auto", "moe_a2a_backend": "none", "enable_eplb": False},
            "",
        ),
        ({"ep_size": 8}, "ep_size 8"),
        ({"moe_runner_backend": "flashinfer_trtllm"}, "moe_runner_backend flashinfer_trtllm"),
        (
            {"ep_size": 2, "enable_eplb": True, "moe_a2a_backend": "deepep"},
            "ep_size 2, enable_eplb True, moe_a2a_backend deepep",
        ),
    ],
)
def test_settings_by_which_experts_are_stored_otherwise_are_named(settings, said):
    assert expert_storage(settings) == said


def test_bytes_that_are_no_whole_words_cannot_be_placed():
    with pytest.raises(ValueError, match="2 bytes from byte 4 on"):
        TileSums().add(torch.zeros(1, dtype=torch.bfloat16), 4)
