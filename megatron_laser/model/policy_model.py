"""The policy: Megatron's GPTModel that answers with log-probs of labelled rows, never logits.

Only this module names GPTModel, its layer specs and its rotary embedding, for which upstream has announced HybridModel
as the successor; `megatron_patches.py` changes one of its rotary functions. Read in Megatron-Core 0.19.2; 0.16.1 has no
`output_processor`, by which the log-prob head takes the place of the output layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_laser.config import padded_vocab_size
from megatron_laser.model import hf_config
from megatron_laser.model.activation_offload import offloading
from megatron_laser.model.experts import ExpertLayer, ExpertTransformerLayer, Router
from megatron_laser.model.megatron_patches import patch_megatron
from megatron_laser.model.torch_layers import PackedSdpaAttention, RMSNorm
from megatron_laser.model.transformer_engine import clear_backend_variables
from megatron_laser.ops import (
    LogProbs,
    RowLoss,
    Sets,
    add_weight_gradient_to_main_grad,
    few_row_logprob,
    linear_logprob,
    set_logprob,
)


@dataclass(frozen=True)
class RowSets:
    """The labelled rows whose label was sampled from a known set of tokens: their log-probs are over that set.

    rows, others: their places among the labelled rows, and those of the rest, increasing int64 on the host; together
    all. sets: of each of `rows` its set.
    """

    rows: np.ndarray
    others: np.ndarray
    sets: Sets


@dataclass(frozen=True)
class HeadInputs:
    """The labelled rows of one packed micro-batch.

    rows [labelled] int64: positions among the rank's packed tokens, not decreasing; positions: the same on the host,
    if known. labels [labelled] int64: global token ids; inv_temperature [labelled] float32. `few_rows` uses the
    no-gradient op for a handful of rows. Entropies have a gradient only with `entropy_gradient`: without it the
    backward leaves out their part of every logit's gradient. `loss`: what the output will be differentiated for,
    exactly: with it the op may make gradients in its forward, where memory is short. `sets`: rows whose log-prob is
    over a set; their entropy is of the whole vocabulary all the same.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    inv_temperature: torch.Tensor
    positions: np.ndarray | None = None
    with_entropy: bool = False
    entropy_gradient: bool = False
    few_rows: bool = False
    loss: RowLoss | None = None
    sets: RowSets | None = None

    def at(self, chosen: np.ndarray) -> HeadInputs:
        """The labelled rows at `chosen`, increasing int64 on the host, alone: without sets and loss."""
        index = torch.from_numpy(chosen).to(self.rows.device)
        return replace(
            self,
            rows=self.rows[index],
            labels=self.labels[index],
            inv_temperature=self.inv_temperature[index],
            positions=None if self.positions is None else self.positions[chosen],
            sets=None,
            loss=None,
        )

    @property
    def distinct(self) -> bool:
        """Whether it is known that no position is there twice."""
        return self.positions is not None and bool((np.diff(self.positions) > 0).all())

    def own_rows(self, tokens: int, rank: int) -> tuple[int, int] | None:
        """(first, last): rows[first:last] lie in the `tokens` positions of sequence-parallel rank `rank`."""
        if self.positions is None:
            return None
        first, last = np.searchsorted(self.positions, (rank * tokens, (rank + 1) * tokens)).tolist()
        return first, last


def log_prob_head(
    hidden_states: torch.Tensor,
    output_layer: ColumnParallelLinear,
    weight: torch.Tensor | None,
    inputs: HeadInputs,
    vocab_size: int,
) -> torch.Tensor:
    """The vocabulary projection as a log-prob op over labelled rows.

    hidden_states [tokens, 1, hidden], or this rank's [tokens / tp, 1, hidden] under sequence parallelism;
    weight [padded vocabulary / tp, hidden] when it is tied, None for the output layer's own.
    Returns [1 or 2, labelled] float32: log-probs and, if asked, entropies.
    """
    # The output layer's forward, which would project to logits, is not called; its pre-hooks are: DDP waits there
    # for an overlapped gather of this very weight.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, (hidden_states,))
    weight = output_layer.weight if weight is None else weight
    # In effect under DistributedDataParallel: dW goes into main_grad unrounded, without a copy of its size.
    add_weight_gradient_to_main_grad(weight)
    group = output_layer.tp_group
    # The op gathers the ranks' tokens beside its first product, chooses rows among them, and reduces or scatters dX.
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    gathers = output_layer.sequence_parallel and group.size() > 1
    if inputs.few_rows:
        return few_row_logprob(
            hidden,
            weight,
            inputs.labels,
            rows=inputs.rows,
            vocab_size=vocab_size,
            tp_group=group,
            sequence_parallel=gathers,
        ).unsqueeze(0)

    def shared(part: HeadInputs) -> dict[str, Any]:
        return dict(
            rows=part.rows,
            own_rows=part.own_rows(hidden.shape[0], group.rank()) if gathers else None,
            distinct_rows=part.distinct,
            inv_temperature=part.inv_temperature,
            vocab_size=vocab_size,
            tp_group=group,
            sequence_parallel=gathers,
        )

    def whole(part: HeadInputs) -> LogProbs:
        return linear_logprob(
            hidden,
            weight,
            part.labels,
            with_entropy=part.with_entropy,
            entropy_gradient=part.entropy_gradient,
            loss=part.loss,
            **shared(part),
        )

    def over_sets(part: HeadInputs, sets: Sets) -> torch.Tensor:
        return set_logprob(hidden, weight, part.labels, sets, **shared(part))

    result = whole(inputs) if inputs.sets is None else _with_sets(inputs, inputs.sets, whole, over_sets)
    if result.entropy is not None:
        return torch.stack([result.logprobs, result.entropy])
    return result.logprobs.unsqueeze(0)


def _with_sets(
    inputs: HeadInputs,
    known: RowSets,
    whole: Callable[[HeadInputs], LogProbs],
    over_sets: Callable[[HeadInputs, Sets], torch.Tensor],
) -> LogProbs:
    """Log-probs over the sets of the rows that have one, else over the vocabulary, of which all entropies are."""
    rows, others = (torch.from_numpy(index).to(inputs.rows.device) for index in (known.rows, known.others))
    own = inputs.at(known.rows)
    logprobs = over_sets(own, known.sets)
    if inputs.with_entropy and inputs.entropy_gradient:
        full = whole(replace(inputs, sets=None, loss=None))
        return LogProbs(full.logprobs.index_copy(0, rows, logprobs), full.entropy)
    # Nothing of the other columns has a gradient: what these rows need of the vocabulary is made without a backward.
    rest = whole(inputs.at(known.others))
    result = logprobs.new_zeros(len(inputs.rows)).index_copy(0, others, rest.logprobs)
    result = result.index_copy(0, rows, logprobs)
    if rest.entropy is None:
        return LogProbs(result, None)
    with torch.no_grad():
        entropy = whole(own).entropy
    assert entropy is not None
    return LogProbs(
        result, torch.zeros_like(result).index_copy(0, others, rest.entropy).index_copy(0, rows, entropy)
    )


class RotaryAngles:
    """Angles [positions, 1, 1, head_dim] of packed sequences, as `RotaryEmbedding.forward` gives them.

    Upstream's cache keeps 32 tables, each as long as the longest sequence of a micro-batch (64 MiB at 128k positions),
    and every model that made one. This keeps the longest alone: the others are its beginnings.
    """

    def __init__(self, embedding: Any) -> None:
        self._make = embedding.get_emb
        self._longest: torch.Tensor | None = None

    def __call__(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> torch.Tensor:
        """`max_seq_len` positions from 0; `cp_group` cuts only sequences that are not packed, which are refused."""
        if not packed_seq and cp_group is not None and cp_group.size() > 1:
            raise ValueError("context parallelism splits packed sequences")
        if offset:
            return self._make(max_seq_len, offset)
        if self._longest is None or len(self._longest) < max_seq_len:
            self._longest = self._make(max_seq_len)
        return self._longest[:max_seq_len]


class PolicyModel(GPTModel):
    """GPTModel that answers with log-probs of labelled rows when `head_inputs` are given."""

    def __init__(
        self,
        config: TransformerConfig,
        hf: PretrainedConfig,
        *,
        vocab_multiple: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        fuse_gradient_accumulation: bool = False,
        offload_activations: bool = False,
    ) -> None:
        """
        Args:
            fuse_gradient_accumulation: Transformer Engine's layers add dW to main_grad in their own products.
            offload_activations: what the layers save for the backward pass waits for it in host memory.
        """
        tensor = config.tensor_model_parallel_size
        padded = padded_vocab_size(hf.vocab_size, tensor, vocab_multiple)
        tied = bool(hf.tie_word_embeddings)
        clear_backend_variables(config.attention_backend.name)
        super().__init__(
            config,
            block_spec(config, vp_stage),
            vocab_size=padded,
            max_sequence_length=hf.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        self.true_vocab_size = hf.vocab_size
        self.rotary_pos_emb.inv_freq = hf_config.rope_inverse_frequencies(hf_config.architecture_of(hf)).to(
            self.rotary_pos_emb.inv_freq.device
        )
        self.rotary_pos_emb.forward = RotaryAngles(self.rotary_pos_emb)  # type: ignore[method-assign,assignment]
        if offload_activations:
            self.decoder.forward = offloading(self.decoder, self.decoder.forward)  # type: ignore[method-assign]
        if fuse_gradient_accumulation:
            _fuse_gradient_accumulation(self)

    def forward(self, *args: Any, head_inputs: HeadInputs | None = None, **kwargs: Any) -> torch.Tensor:
        """GPTModel.forward; on the last stage [1 or 2, labelled] float32 when `head_inputs` is given."""
        if head_inputs is not None:
            kwargs |= dict(output_processor=self._log_probs, output_processor_context=head_inputs)
        return super().forward(*args, **kwargs)

    def _log_probs(
        self,
        *,
        hidden_states: torch.Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: torch.Tensor | None,
        context: HeadInputs,
        **_: Any,
    ) -> torch.Tensor:
        """What GPTModel calls in place of the output layer (its `output_processor`)."""
        return log_prob_head(hidden_states, output_layer, output_weight, context, self.true_vocab_size)


def _fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Switch on Transformer Engine's own gradient accumulation fusion, which its modules read at every call.

    Megatron's switch for it would also ask for apex, for the sake of the output layer, whose forward is not called.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder block's modules for this rank's pipeline stage (and virtual stage)."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        norm: Any = TENorm
        if config.params_dtype == torch.float32:
            # Transformer Engine has no fast attention for float32, and for packed sequences not always a slow one.
            layer.submodules.self_attention.submodules.core_attention = PackedSdpaAttention
    else:
        patch_megatron()
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        norm = RMSNorm
        modules = layer.submodules
        modules.input_layernorm = modules.pre_mlp_layernorm = norm
        attention = modules.self_attention.submodules
        attention.core_attention = PackedSdpaAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
    if config.num_moe_experts:
        # The MLP's builder is a partial of Megatron's layer of experts; the class and its router are ours.
        builder = layer.submodules.mlp
        submodules = replace(builder.keywords["submodules"], router=Router)
        layer.submodules.mlp = partial(ExpertLayer, submodules=submodules)
        layer.module = ExpertTransformerLayer
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )
