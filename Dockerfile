# syntax=docker/dockerfile:1
# megatron_laser on an NVIDIA NGC PyTorch image: its torch, Transformer Engine, apex, triton and NCCL are kept.
#
#   docker build --build-arg NGC_TAG=25.10-py3 -t megatron-laser .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
#     -v /models:/workspace/megatron_laser/models -v /data:/workspace/megatron_laser/data megatron-laser \
#     torchrun --nproc-per-node 8 -m megatron_laser train examples/qwen2.5-7b.yaml
#
# --ipc host: NCCL and torch exchange data through /dev/shm, and the default 64 MB are not enough.
#
# Rollout servers do not live here. SGLang pins versions of torch, transformers and numpy of its own, which
# differ from this image's; it gets an environment (or an image) of its own, started as a child process.
ARG NGC_TAG=25.10-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

WORKDIR /workspace/megatron_laser

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

# Without the gpu extra: the image has Transformer Engine and triton.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_laser ./megatron_laser
RUN pip install --no-cache-dir --no-build-isolation --constraint /etc/megatron-laser-constraints.txt --editable .

# The build fails here if pip has replaced the image's torch or broken what was compiled against it.
RUN python - <<'PY'
import importlib.metadata as metadata
import pathlib

for line in pathlib.Path("/etc/megatron-laser-constraints.txt").read_text().split():
    name, _, version = line.partition("==")
    assert metadata.version(name) == version, f"{name} {version} became {metadata.version(name)}"

import torch
import transformer_engine.pytorch  # noqa: F401

import megatron_laser  # noqa: F401

assert torch.version.cuda, "this torch has no CUDA"
PY

COPY . .
ENV CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false
