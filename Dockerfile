# syntax=docker/dockerfile:1
# megatron_laser on an NVIDIA NGC PyTorch image, whose torch, Transformer Engine, apex, triton and NCCL are kept, and SGLang
# in an environment of its own. Not built here; the RUN lines that need no image are run by tests/unit/test_dockerfile.py.
#
#   docker build --build-arg NGC_TAG=25.10-py3 -t megatron-laser .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
#     -v /models:/workspace/megatron_laser/models -v /data:/workspace/megatron_laser/data \
#     -v /runs:/workspace/megatron_laser/runs megatron-laser \
#     examples/launch/one_node.sh examples/qwen2.5_7b/laser.yaml
#
# --ipc host: NCCL and torch exchange data through /dev/shm, and the default 64 MB are not enough. /runs must be
# writable by user 10001 (or build with --build-arg USER_ID=$(id -u)).
ARG NGC_TAG=25.10-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

WORKDIR /workspace/megatron_laser

# Rollout servers: SGLang pins versions of torch, transformers and numpy that differ from this image's. First, since it
# is the biggest layer and changes least. The image's own constraints are for its own packages.
RUN python -m venv /opt/sglang
RUN PIP_CONSTRAINT= /opt/sglang/bin/python -m pip install --no-cache-dir sglang==0.5.23 sglang-router==0.3.2

# What must not be replaced, at the versions that the image has: its builds match its CUDA and NCCL, and no
# package index has them.
RUN python - <<'PY' >/etc/megatron-laser-constraints.txt
import importlib.metadata as metadata
import re

KEEP = re.compile(
    r"(torch|torchvision|torchao|pytorch[-_]triton|triton|transformer[-_]engine.*|apex|flash[-_]attn.*|numpy)$",
    re.IGNORECASE,
)
for distribution in metadata.distributions():
    if KEEP.match(distribution.metadata["Name"]):
        print(f"{distribution.metadata['Name']}=={distribution.version}")
PY

# Without the gpu extra: the image has Transformer Engine and triton. megatron-core comes from the index.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_laser ./megatron_laser
RUN pip install --no-cache-dir --no-build-isolation --constraint /etc/megatron-laser-constraints.txt --editable .

# The build fails here if pip has replaced what the image brought.
RUN python - <<'PY'
import importlib.metadata as metadata
import pathlib

for line in pathlib.Path("/etc/megatron-laser-constraints.txt").read_text().split():
    name, _, version = line.partition("==")
    found = metadata.version(name)
    assert found == version, f"{name} {version} became {found}"
PY

# And here if it has broken what was compiled against it.
RUN python - <<'PY'
import apex  # noqa: F401
import torch
import transformer_engine.pytorch  # noqa: F401

import megatron_laser  # noqa: F401

assert torch.version.cuda, "this torch has no CUDA"
PY

COPY . .
# `serve` looks here first (rollout.sglang.python).
RUN ln -s /opt/sglang .venv-sglang

# Servers take commands over the network: nothing in here needs root.
ARG USER_ID=10001
RUN useradd --create-home --uid ${USER_ID} --user-group laser \
    && mkdir -p models data runs \
    && chown laser:laser . runs
USER laser
ENV CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false
