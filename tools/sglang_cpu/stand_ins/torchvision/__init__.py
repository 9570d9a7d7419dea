"""Stand-in for torchvision, which SGLang imports for image models and never uses when it serves text.

torchvision's builds are tied to a build of torch; this one satisfies imports with any. Every name can be imported,
and fails loudly when it is called, instantiated, or asked for an attribute.
"""

import enum
import importlib.machinery
import sys
import types

__version__ = "0.0.0"

_SUBMODULES = (
    "transforms",
    "transforms.functional",
    "transforms.v2",
    "transforms.v2.functional",
    "io",
    "ops",
)


class InterpolationMode(enum.Enum):
    """Named in annotations and defaults of image processors."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Unavailable(type):
    """A class that can be named (imports, annotations, base classes) and nothing else."""

    def __call__(cls, *_: object, **__: object) -> object:
        raise _error(cls.__name__)

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _error(f"{cls.__name__}.{name}")


def _error(name: str) -> RuntimeError:
    return RuntimeError(
        f"torchvision's {name} is not in the stand-in of the CPU environment (tools/sglang_cpu), which serves text "
        "models only"
    )


class _Submodule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.InterpolationMode = InterpolationMode

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unavailable(name, (), {})


for _name in _SUBMODULES:
    _module = _Submodule(f"{__name__}.{_name}")
    sys.modules[_module.__name__] = _module
    _parent, _, _leaf = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _leaf, _module)
