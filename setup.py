"""Package definition. Exact versions of the CPU set-up are in constraints-cpu.txt."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.6",
    "megatron-core==0.16.*",
    "psutil",  # megatron-core's checkpoint writer needs it and does not declare it
    "transformers>=4.57",
    "safetensors",
    "math-verify>=0.8",
    "pyyaml",
    "pydantic>=2.8",
    "typer>=0.15",
    "rich",
    "numpy",
    "aiohttp>=3.11",
    "orjson",
    "tenacity",
    "pebble>=5",
    "pyarrow",
    "matplotlib",
    "tensorboard",
]

EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[pytorch]", "triton>=3.6"],
    "wandb": ["wandb"],
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
    package_data={"megatron_laser": ["py.typed", "ops/cuda/*.cu"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["megatron-laser = megatron_laser.cli:main"]},
)
