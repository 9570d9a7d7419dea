"""Package definition. Exact versions of the CPU set-up are in constraints-cpu.txt."""

import importlib.metadata
import sys
from pathlib import Path

from setuptools import find_packages, setup

MEGATRON_CORE = "0.19."


def require_megatron_core() -> None:
    """On Python 3.11 pip refuses megatron-core, so it has to be there already: say how before anything is built."""
    if sys.version_info >= (3, 12):
        return
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if not found.startswith(MEGATRON_CORE):
        sys.exit(
            f"megatron_laser needs megatron-core {MEGATRON_CORE}*, whose metadata asks for Python 3.12 or newer. This "
            f"is Python {sys.version_info[0]}.{sys.version_info[1]}, and pip's build environment has {found}. Either "
            "use Python 3.12, or run tools/setup_env.sh, or run:\n"
            "  pip install torch setuptools\n"
            "  pip install --no-deps --ignore-requires-python megatron-core==0.19.2\n"
            "  pip install --no-build-isolation ."
        )


require_megatron_core()

INSTALL_REQUIRES = [
    "torch>=2.11,<2.15",
    # Its metadata asks for Python 3.12; the wheel for 3.11 works, and tools/setup_env.sh installs it.
    "megatron-core==0.19.*; python_version >= '3.12'",
    "psutil",  # megatron-core's checkpoint writer needs it and does not declare it
    "transformers>=5.19,<5.24",  # from SGLang's pin to what the tests ran with
    "tokenizers",  # whichever transformers asks for
    "safetensors",
    "math-verify>=0.8",
    "latex2sympy2_extended",  # this one and sympy: whichever math-verify asks for
    "sympy",
    "jinja2>=3.1",
    "pyyaml",
    "pydantic>=2.8",
    "typer>=0.15",
    "rich",
    "numpy>=1.26",  # with NumPy 1 also pyarrow<26, which pip cannot be told
    "aiohttp>=3.11",
    "orjson",
    "pyarrow>=24",
    "matplotlib",
    "tensorboard",
]

EXTRAS_REQUIRE = {
    # Transformer Engine's torch extension exists as source only and must be built against the torch that is installed,
    # which pip's own build environment does not do: tools/setup_gpu.sh builds it.
    "gpu": ["transformer-engine[core_cu13]==2.20.*", "triton>=3.6,<3.9"],
    "wandb": ["wandb"],
    "smollm2": ["gguf>=0.17", "accelerate>=1.1"],  # transformers reads the example's model with them
    "test": [
        *(
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.6",
            "hypothesis",
            "scikit-learn",
            "openai",
            "ruff",
            "mypy",
            "types-PyYAML",
        ),
        # Neither needs a GPU: the kernels are tested in Triton's interpreter and compiled for Hopper.
        *("triton>=3.7; platform_system == 'Linux'", "nvidia-cuda-nvrtc; platform_system == 'Linux'"),
    ],
}

setup(
    name="megatron_laser",
    version="0.1.0",
    description="LaSeR (RL with last-token self-rewarding) training on Megatron-Core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_laser", "megatron_laser.*"]),
    package_data={"megatron_laser": ["py.typed", "ops/cuda/*.cu", "viewer/web/*", "viewer/web/**/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megatron-laser = megatron_laser.cli:main"]},
)
