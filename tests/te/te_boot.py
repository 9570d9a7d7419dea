"""Megatron-Core on Transformer Engine without a GPU. Call `boot` before anything imports megatron.

Real: Transformer Engine's Python package (its modules, their parameters and marks, their autograd functions with the
tensor- and sequence-parallel collectives, attention's choice of a backend, FusedAdam), Megatron-Core's extension of
it, this project, gloo, and what `megatron_laser.model.platform` does on a machine without CUDA.

Fake, all of it here and in te_extension.py:

- the compiled extension (te_extension.py) and `load_framework_extension`, which would load it as a shared object;
- `torch` inside Transformer Engine's modules is the project's CPU proxy with a GPU of compute capability 9.0 and CUDA
  13.0 added;
- `Tensor.is_cuda` is true for whoever asks from one of these modules;
- requests of the context ring, for some of which it waits twice: NCCL does not mind, gloo would wait forever;
- the states of CUDA's random generators, which recomputation under FP8 keeps: nothing here is random;
- einops and the export to ONNX, which are imported and not used by what runs here.

Nobody else sees CUDA; layers are built from Transformer Engine because `model.layers` says so.
torch.compile is off: Megatron compiles a few elementwise functions, and here they would be compiled for a CPU.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

UNUSED = ("einops", "transformer_engine.pytorch.onnx_extensions")


def boot(sources: Path) -> None:
    """Import Transformer Engine from `sources` over the stand-in extension."""
    assert "megatron.core" not in sys.modules
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no shared libraries are looked for
    sys.path.insert(0, str(sources))
    for name in UNUSED:
        sys.modules[name] = _Unused(name)
    import te_extension

    sys.modules["transformer_engine_torch"] = te_extension
    _import_package()
    _pretend_cuda()
    _wait_once()
    _without_generators()


class _Unused(types.ModuleType):
    """A module from which any name can be imported and none used."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _import_package():
    # transformer_engine/__init__.py imports its PyTorch part at once; the loader has to be replaced before.
    spec = importlib.util.find_spec("transformer_engine")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")  # the package swallows an ImportError of it


def _pretend_cuda():
    import torch

    from megatron_laser.model import platform

    class Cuda(platform._CudaProxy):
        def __init__(self):
            super().__init__()
            properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
            self.is_available = lambda: True
            self.is_current_stream_capturing = lambda: False
            self.get_device_properties = lambda *args: properties
            self.get_device_capability = lambda *args: (9, 0)

    proxy = platform._TorchProxy()
    proxy.cuda = Cuda()
    proxy.version = types.SimpleNamespace(**vars(torch.version) | {"cuda": "13.0"})
    inside = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "torch", None) is torch:
            module.torch = proxy
            inside.add(name)
    real = torch.Tensor.is_cuda

    def is_cuda(tensor):
        asker = sys._getframe(1).f_globals.get("__name__")
        return asker in inside or real.__get__(tensor)

    torch.Tensor.is_cuda = property(is_cuda)


def _wait_once():
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    communicate = context_parallel.flash_attn_p2p_communicate

    def flash_attn_p2p_communicate(*args):
        return [_Request(work) for work in communicate(*args)]

    context_parallel.flash_attn_p2p_communicate = flash_attn_p2p_communicate


def _without_generators():
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *args, **kwargs: None
    distributed._set_cuda_rng_state = lambda *args, **kwargs: None


class _Request:
    def __init__(self, work):
        self._work = work

    def wait(self):
        if self._work is not None:
            self._work.wait()
            self._work = None
