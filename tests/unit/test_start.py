"""The first minute of a run: deadlines of store and groups, communicators, and what the machine cannot do."""

import socket
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.models import save_tiny_model
from helpers.runs import run_config

from megatron_laser.model import platform

platform.install()

from megatron.core import parallel_state  # noqa: E402

from megatron_laser import loop  # noqa: E402
from megatron_laser.config import ConfigError, resolve_plan  # noqa: E402
from megatron_laser.distributed import communicators, runtime  # noqa: E402
from megatron_laser.run import session as machine  # noqa: E402
from megatron_laser.run import setup  # noqa: E402
from megatron_laser.run.session import check_machine, machine_problems  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


class Enough(Exception):
    pass


def test_the_store_waits_as_long_as_a_rank_does_once_all_have_met(model, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {}

    def note(*_, **arguments):
        given.update(arguments)
        raise Enough

    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    config = run_config(tmp_path, model, "run.start_grace=7", "run.deadline=90")
    monkeypatch.setattr(dist, "init_process_group", note)
    with pytest.raises(Enough):
        runtime.start(config)
    assert (given["rank"], given["world_size"]) == (0, 1)
    store = given["store"]
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert store.timeout == timedelta(seconds=90)


def test_megatrons_groups_get_the_deadline_to_the_second(model, tmp_path, monkeypatch):
    def note(**arguments):
        given.update(arguments)
        raise Enough

    given = {}
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", note)
    with pytest.raises(Enough):
        runtime.build_groups(run_config(tmp_path, model, "run.deadline=90"), dist.HashStore())
    assert given["create_gloo_process_groups"] is False
    assert timedelta(minutes=given["distributed_timeout_minutes"]) == timedelta(seconds=90)


class Group:
    """As much of a process group as `bring_up` asks for on this side of a collective."""

    def __init__(self, *ranks):
        self.ranks = list(ranks)

    def size(self):
        return len(self.ranks)

    def rank(self):
        return 0


class Answer:
    def __init__(self, error=None, tensor=None):
        self.error, self.tensor = error, tensor

    def wait(self, timeout):
        if self.error is not None:
            raise self.error
        self.tensor.fill_(2.0)
        return True


@pytest.fixture
def state(monkeypatch):
    """Megatron's groups of a rank of a 2 x 2 layout, and what was reduced in them."""
    tensor, data, pipeline, everybody, alone = Group(4, 5), Group(4, 8), Group(4), Group(4, 5, 8, 9), Group(4)
    groups = {
        "get_tensor_model_parallel_group": tensor,
        "get_context_parallel_group": alone,
        "get_data_parallel_group": data,
        "get_pipeline_model_parallel_group": pipeline,
        "get_model_parallel_group": tensor,
        "get_intra_distributed_optimizer_instance_group": everybody,
        "get_embedding_group": None,
    }
    for name, group in groups.items():
        monkeypatch.setattr(parallel_state, name, lambda *_, group=group, **__: group)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group.ranks)
    monkeypatch.setattr(dist, "get_rank", lambda: 4)
    return {"tensor": tensor, "data": data, "optimizer": everybody}


def test_each_group_of_several_ranks_is_brought_up_once(state):
    assert dict(communicators.groups()) == state


def test_a_communicator_that_does_not_come_up_is_named_with_its_ranks(state, monkeypatch):
    reduced = []

    def all_reduce(tensor, group, async_op):
        reduced.append(group)
        late = TimeoutError("wait timeout after\n90000ms, keys: /0/1") if group is state["data"] else None
        return Answer(late, tensor)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(RuntimeError) as caught:
        communicators.bring_up(90.0, paired_stages=False)
    assert reduced == [state["tensor"], state["data"]]
    message = str(caught.value)
    assert message.startswith("rank 4: the communicator of its data group, ranks [4, 8], did not come up")
    assert "run.deadline 90 s: TimeoutError: wait timeout after 90000ms, keys: /0/1" in message
    assert "NCCL_SOCKET_IFNAME" in message


def test_a_call_that_never_returns_ends_the_process_with_the_same_words(state, monkeypatch):
    said, back = [], threading.Event()
    state["optimizer"].ranks = [4, 8]

    def end(reason):
        said.append(reason)
        back.set()

    monkeypatch.setattr(communicators, "end_process", end)
    monkeypatch.setattr(communicators, "_BEYOND", 0.1)
    monkeypatch.setattr(
        dist, "all_reduce", lambda tensor, group, async_op: back.wait(30) and Answer(None, tensor)
    )
    communicators.bring_up(0.1, paired_stages=False)
    assert said[0].startswith("rank 4: the communicator of its tensor group, ranks [4, 5], did not come up")
    assert "run.deadline 0.1 s: the call that makes it does not return" in said[0]
    assert "NCCL_SOCKET_IFNAME" in said[0]


def test_a_communicator_that_does_not_add_up_is_an_error(state, monkeypatch):
    state["tensor"].ranks = [4, 5, 6]
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group, async_op: Answer(None, tensor))
    with pytest.raises(RuntimeError, match=r"its tensor group.*the sum of 3 ones is 2"):
        communicators.bring_up(90.0, paired_stages=False)


@pytest.fixture
def gpu(monkeypatch):
    """A device of the given size, for the check alone."""

    def of(total):
        monkeypatch.setattr(platform, "total_memory_bytes", lambda: total)

    return of


def test_a_device_with_less_memory_than_the_plans_sum_is_refused(model, tmp_path, gpu):
    config = run_config(tmp_path, model, "model.keep_logits_gib=0")  # auto takes less of a smaller device
    needed = resolve_plan(config, 1).memory.total
    assert needed > 2**20
    gpu(needed)
    assert machine_problems(config, 1) == []
    gpu(needed - 1)
    (problem,) = machine_problems(config, 1)
    assert problem.startswith("memory: a rank needs") and platform.device_name() in problem


def test_a_colocated_servers_share_is_one_of_this_device(model, tmp_path, gpu):
    options = {"mem_fraction_static": 0.8}
    rollout = {"engine": "sglang", "weight_sync": "colocated", "sglang": {"options": options}}
    gpu(40 * 2**30)  # 0.8 of an H100's 79.1 GiB would not fit
    assert machine_problems(run_config(tmp_path, model, rollout=rollout), 1) == []


def test_on_a_cpu_there_is_no_such_limit(model, tmp_path):
    assert platform.total_memory_bytes() is None
    assert machine_problems(run_config(tmp_path, model), 1) == []


def test_everything_that_the_machine_lacks_is_said_at_once(model, tmp_path, gpu, monkeypatch):
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    gpu(1000)
    config = run_config(tmp_path, model, "optimizer.gradient_accumulation_fusion=on")
    starts = ("model.attention: auto", "optimizer.gradient_accumulation_fusion: on", "memory: a rank needs")
    problems = machine_problems(config, 1)
    assert len(problems) == 3
    assert all(problem.startswith(start) for problem, start in zip(problems, starts))


def test_flash_attention_needs_its_package(model, tmp_path, monkeypatch):
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)  # Megatron sets them with every model that it builds
    monkeypatch.setattr(machine, "use_transformer_engine", lambda layers: True)
    config = run_config(tmp_path, model, "model.attention=flash", "model.dtype=bfloat16")
    (problem,) = machine_problems(config, 1)
    assert problem.startswith("model.attention: flash needs one of flash-attn")
    monkeypatch.setattr(machine, "_installed", lambda package: package == "flash-attn-3")
    assert machine_problems(config, 1) == []


def test_what_any_rank_lacks_ends_every_rank_with_the_same_words(
    single_process, model, tmp_path, monkeypatch
):
    import dataclasses

    def gather(found, own, group):
        found[:] = [[], ["too small"], ["too small", "no engine"]]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    three = dataclasses.replace(single_process, world_size=3)
    with pytest.raises(ConfigError) as caught:
        check_machine(run_config(tmp_path, model), three)
    assert caught.value.problems == ("too small (rank 1)", "no engine (rank 2)")


def test_a_run_ends_before_inputs_and_model_when_the_device_is_too_small(
    single_process, model, tmp_path, gpu, monkeypatch
):
    def too_late(*_, **__):
        raise AssertionError("the machine was to be checked before")

    for name in ("read_inputs", "Trainer"):
        monkeypatch.setattr(setup, name, too_late)
    monkeypatch.setattr(runtime, "start", lambda config: single_process)
    monkeypatch.setattr(runtime, "stop", lambda: None)
    config = run_config(tmp_path, model)
    with pytest.raises(AssertionError, match="was to be checked before"):
        loop.train(config)
    gpu(1000)
    with pytest.raises(ConfigError, match="memory: a rank needs"):
        loop.train(config)


def test_a_thread_is_bound_to_the_device_of_its_process(monkeypatch):
    bound = []
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    platform.use_device(torch.device("cpu"))
    platform.use_device(torch.device("cuda", 3))
    assert bound == [torch.device("cuda", 3)]
