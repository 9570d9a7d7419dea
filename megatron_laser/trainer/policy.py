"""The trained policy on this rank: model chunks, Megatron DDP, optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from transformers import PretrainedConfig

from megatron_laser.config import ConfigError
from megatron_laser.config.derived import micro_batch_tokens, optimizer_steps
from megatron_laser.config.model_folder.continuation import longest_trained
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.stages import chunk_layers
from megatron_laser.model import platform
from megatron_laser.model.experts import freeze_routers
from megatron_laser.model.fake_weights import open_weights
from megatron_laser.model.gradient_fusion import fuses_gradient_accumulation
from megatron_laser.model.hf_config import architecture_of, read_hf_config, transformer_config
from megatron_laser.model.hf_folder import HfFolder
from megatron_laser.model.machine import memory_setting_problems
from megatron_laser.model.mapping import Geometry
from megatron_laser.model.platform import DTYPES
from megatron_laser.model.policy_model import PolicyModel
from megatron_laser.model.transformer_engine import (
    attention_problems,
    backend_variable_problems,
    use_transformer_engine,
)
from megatron_laser.model.weights import WeightExporter, load_weights
from megatron_laser.ops import configure
from megatron_laser.trainer import optimizer_state
from megatron_laser.trainer.chunks import Chunks
from megatron_laser.trainer.offload import Part, StateOffload


@dataclass
class Policy:
    """The trained model with its optimizer."""

    chunks: Chunks
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    exporter: WeightExporter
    memory: StateOffload = field(init=False)

    def __post_init__(self) -> None:
        self.memory = StateOffload(self.chunks, self.optimizer)

    @contextmanager
    def optimizer_on_device(self) -> Iterator[None]:
        """With the optimizer's state on the device, and afterwards where it was (`optimizer.offload`)."""
        away = Part.OPTIMIZER not in self.memory.on_device
        self.memory.onload({Part.OPTIMIZER})
        try:
            yield
        finally:
            if away:
                self.memory.offload({Part.OPTIMIZER}, for_others=False)

    def complete_weights(self) -> None:
        """Gather the weights of the last update where the next forward would (`overlap_param_gather`). A collective."""
        for module in self.chunks.wrapped:
            if module.ddp_config.overlap_param_gather:  # else they are there
                module.start_param_sync(force_sync=True)

    def learning_rate(self) -> float:
        """Learning rate of the last optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])


def build_chunks(
    config: RunConfig, hf: PretrainedConfig, folder: HfFolder, *, trained: bool = False
) -> Chunks:
    """Build this rank's part of the model and load its weights from `folder`, shard by shard.

    `trained`: it will be wrapped in DDP and so have `main_grad`, into which layers may add dW.

    Raises ConfigError when Transformer Engine has no attention for it on this device; no weight was read then.
    """
    parallel = config.parallel
    fuse = trained and fuses_gradient_accumulation(
        config.optimizer.gradient_accumulation_fusion,
        transformer_engine=use_transformer_engine(config.model.layers),
    )
    uneven: tuple[int, ...] = ()
    if parallel.pipeline > 1 and parallel.stage_layers != "even":
        uneven = chunk_layers(config, architecture_of(hf))
    model_config = transformer_config(
        hf,
        dtype=DTYPES[config.model.dtype],
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        sequence=parallel.sequence,
        layers=config.model.layers,
        attention=config.model.attention,
        fuse_gradient_accumulation=fuse,
        chunk_layers=uneven,
        recompute=config.model.recompute,
        recompute_layers=config.model.recompute_layers,
        fp8=config.model.fp8,
    )
    stages: list[int | None] = (
        list(range(parallel.virtual_pipeline)) if parallel.virtual_pipeline > 1 else [None]
    )
    geometry = Geometry.of(
        hf,
        tensor=parallel.tensor,
        vocab_multiple=config.model.vocab_multiple,
        expert_tensor=parallel.expert_tensor,
    )
    models = []
    for stage in stages:
        model = PolicyModel(
            model_config,
            hf,
            vocab_multiple=config.model.vocab_multiple,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
            fuse_gradient_accumulation=fuse,
            offload_activations=trained and config.model.offload_activations,
        )
        models.append(model.to(platform.device()))
    heads = (hf.num_attention_heads // parallel.tensor, hf.num_key_value_heads // parallel.tensor)
    sizes = dict(tokens=micro_batch_tokens(config), longest=longest_trained(config))
    if problems := attention_problems(model_config, **sizes, heads=heads):
        raise ConfigError(problems)
    load_weights(models, folder, hf, geometry)
    wrapped: list[torch.nn.Module] = list(models)
    if model_config.bf16:
        wrapped = [Float16Module(model_config, model) for model in models]
    return Chunks(models, wrapped, model_config, hf, geometry)


def build_policy(config: RunConfig) -> Policy:
    """The trained policy: weights from `model.path`, DDP, optimizer and schedule.

    Raises ConfigError, before weights are read, when Transformer Engine, the environment's choice of its attention or
    this machine does not fit `model` and `optimizer`.
    """
    if problems := [
        *backend_variable_problems(config.model.attention),
        *memory_setting_problems(config),
    ]:
        raise ConfigError(problems)
    keep = config.model.keep_logits_gib
    configure(keep_logits_bytes=None if keep is None else round(keep * 2**30))
    hf = read_hf_config(config.model.path)
    with open_weights(config) as folder:
        chunks = build_chunks(config, hf, folder, trained=True)
    if config.moe.freeze_router:
        for module in chunks.models:
            freeze_routers(module)
    _wrap_ddp(config, chunks)
    optimizer = _build_optimizer(config, chunks)
    chunks.config.grad_scale_func = optimizer.scale_loss
    policy = Policy(
        chunks,
        optimizer,
        _build_scheduler(config, optimizer),
        WeightExporter(chunks.models, hf, chunks.geometry),
    )
    if config.optimizer.offload:
        policy.memory.offload({Part.OPTIMIZER}, for_others=False)
    else:
        # Until a checkpoint is loaded or the first update is made, the moments are not there and look like free memory.
        configure(reserved_bytes=optimizer_state.missing_moment_bytes(optimizer))
    return policy


def build_reference(config: RunConfig) -> Chunks:
    """A frozen copy of the initial model, for KL terms and the reference ablation; no DDP, no optimizer."""
    hf = read_hf_config(Path(config.model.path))
    with open_weights(config) as folder:
        chunks = build_chunks(config, hf, folder)
    for module in chunks.wrapped:
        module.requires_grad_(False)
        module.eval()
    return chunks


def _wrap_ddp(config: RunConfig, chunks: Chunks) -> None:
    settings = config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=settings.gradient_dtype == "float32",
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
    )
    chunks.wrapped = [
        DistributedDataParallel(chunks.config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(chunks.wrapped)
    ]
    if settings.overlap_grad_reduce:
        no_sync: Any = [module.no_sync for module in chunks.wrapped]
        chunks.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    chunks.config.finalize_model_grads_func = _finalize_gradients


def _finalize_gradients(model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Sum gradients over ranks and stop there: every loss term is already divided by its global count."""
    finalize_model_grads(model, None, **kwargs)


def _build_optimizer(config: RunConfig, chunks: Chunks) -> MegatronOptimizer:
    settings = config.optimizer
    moments = DTYPES[settings.moments_dtype]
    small = moments != torch.float32
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.grad_clip,
        bf16=chunks.config.bf16,
        params_dtype=chunks.config.params_dtype,
        use_distributed_optimizer=settings.distributed,
        overlap_param_gather=settings.overlap_param_gather,
        use_precision_aware_optimizer=small,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        # Whole float32 weights: what is left of them beside bfloat16 ones would be rounded otherwise than elsewhere.
        store_param_remainders=False,
    )
    # Norms and biases take no weight decay.
    return get_megatron_optimizer(
        optimizer_config,
        chunks.wrapped,
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
    )


def _build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(optimizer_steps(config), settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
