"""Fixtures for tests that need Megatron's parallel state in the test process."""

import os

# Before torch is imported: the machine's cores belong to the whole test run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is imported: without an NVIDIA device its kernels are tested in its interpreter, on CPU tensors.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_configure(config):
    """Megatron warns at import that Transformer Engine and Apex are missing: expected on a CPU."""
    config.addinivalue_line("filterwarnings", r"ignore::Warning:megatron\..*")


def pytest_collection_modifyitems(items):
    from helpers.side_by_side import long_ones_first

    items[:] = long_ones_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    from helpers.forgotten_threads import end_forgotten_threads

    done = yield
    end_forgotten_threads()
    return done


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `pytest -n 2`, whatever --dist says: what a module's fixture holds is made once."""
    from helpers.side_by_side import scheduling

    return scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def pictures(request):
    """Figures are painted in modules that say so with `PAINTED = True`."""
    if getattr(request.module, "PAINTED", False):
        yield
        return
    from helpers.pictures import unpainted

    with unpainted():
        yield


@pytest.fixture(scope="module")
def heard_signals():
    """What nohup, or a shell that starts the tests in its background, has ignored is heard here, and by children."""
    import signal

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGHUP)}
    ignored = [each for each, handler in before.items() if handler is signal.SIG_IGN]
    for each in ignored:
        signal.signal(each, signal.default_int_handler if each is signal.SIGINT else signal.SIG_DFL)
    yield
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    """Process groups of a run on one process, without torchrun; gives the Runtime."""
    import torch
    from helpers.models import save_tiny_model
    from helpers.runs import run_config

    from megatron_laser.distributed import runtime

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("single_process")
    save_tiny_model(folder / "model", "qwen2")
    yield runtime.start(run_config(folder, folder / "model"))
    runtime.stop()


@pytest.fixture(scope="module")
def process_group():
    """A default group of one, as a run without torchrun has."""
    import torch.distributed as dist

    created = not dist.is_initialized()
    if created:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if created:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory):
    """The one real SGLang server that all tests share; a `SharedServer`, started when the first test asks for it."""
    from helpers.sglang_server import shared_server

    with shared_server(tmp_path_factory.mktemp("sglang_server")) as server:
        yield server
