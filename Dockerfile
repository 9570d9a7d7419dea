# syntax=docker/dockerfile:1
# megatron_laser: one environment, with one torch and one NCCL, for the trainer and SGLang's servers, on an NVIDIA NGC
# image, of which the CUDA toolkit and the network libraries are used and not its torch: no index has that build, and
# SGLang pins another one. `megatron-laser serve` starts servers as child processes of the same interpreter.
#
# Not built here, and never run: there was no Docker and no GPU. Every RUN line that needs no image is run by
# tests/unit/test_dockerfile.py; tools/gpu/resolve.py shows, without an image, that its packages fit together.
#
#   docker build --build-arg NGC_TAG=25.10-py3 -t megatron-laser .
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 --ulimit nofile=65536 \
#     -v /models:/workspace/megatron_laser/models -v /data:/workspace/megatron_laser/data \
#     -v /runs:/workspace/megatron_laser/runs -v megatron-laser-cache:/home/laser/.cache megatron-laser \
#     examples/launch/one_node.sh examples/qwen2.5_7b/laser.yaml
#
# --ipc host: NCCL and torch exchange data through /dev/shm, and the default 64 MB are not enough. /runs must be
# writable by user 10001 (or build with --build-arg USER_ID=$(id -u)). The volume megatron-laser-cache keeps what
# SGLang, FlashInfer, Triton and torch compile at first use: without it every container compiles for minutes, in all
# servers at once. The driver must be 580 or newer.
#
# NGC_TAG: CUDA 13.0, like the pinned torch; a newer image of CUDA 13 works as well. Transformer Engine's extension is
# compiled with it.
ARG NGC_TAG=25.10-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

WORKDIR /workspace/megatron_laser

# The biggest layers first; they change only with these files. The steps are those of a machine without Docker.
COPY tools/setup_gpu.sh tools/setup_gpu.sh
COPY tools/gpu tools/gpu
ENV PIP_NO_CACHE_DIR=1
RUN tools/setup_gpu.sh --venv /opt/megatron-laser --only venv
RUN tools/setup_gpu.sh --venv /opt/megatron-laser --only packages
RUN tools/setup_gpu.sh --venv /opt/megatron-laser --only transformer-engine

COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_laser ./megatron_laser
RUN tools/setup_gpu.sh --venv /opt/megatron-laser --only package

# The build fails here unless torch, the NCCL that it loads, Transformer Engine, triton, SGLang, transformers, numpy and
# pyarrow are the pinned ones and import.
RUN tools/setup_gpu.sh --venv /opt/megatron-laser --only check
RUN /opt/megatron-laser/bin/python -c "import megatron_laser.loop; print('megatron_laser imports')"

COPY . .
# Where `serve` looks with rollout.sglang.device: cpu; otherwise it takes the interpreter that it runs in.
RUN ln -s /opt/megatron-laser .venv-sglang

# Servers take commands over the network: nothing in here needs root. Ubuntu 24.04 has user 1000 already.
ARG USER_ID=10001
RUN (getent passwd ${USER_ID} | cut -d: -f1 | xargs -r userdel) \
    && useradd --create-home --uid ${USER_ID} --user-group laser \
    && mkdir -p models data runs /home/laser/.cache \
    && chown laser:laser . runs /home/laser/.cache
USER laser
# NCCL_*: SGLang's servers use 0 where nothing is set, and the trainer must have the same.
ENV NCCL_CUMEM_ENABLE=0 NCCL_NVLS_ENABLE=0
ENV PATH=/opt/megatron-laser/bin:${PATH} CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false
VOLUME /home/laser/.cache
