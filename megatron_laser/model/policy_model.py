"""The policy: Megatron's GPTModel whose output layer returns log-probs of labelled rows, never logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_laser.config import padded_vocab_size
from megatron_laser.model import hf_config
from megatron_laser.model.specs import block_spec
from megatron_laser.ops import add_weight_gradient_to_main_grad, few_row_logprob, linear_logprob


@dataclass(frozen=True)
class HeadInputs:
    """The labelled rows of one packed micro-batch.

    rows [labelled] int64: positions in the packed token order; labels [labelled] int64: global token ids;
    inv_temperature [labelled] float32. `few_rows` uses the no-gradient op for a handful of rows.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    inv_temperature: torch.Tensor
    with_entropy: bool = False
    few_rows: bool = False


class LogProbHead(ColumnParallelLinear):
    """The vocabulary projection as a log-prob op over labelled rows.

    Called through its forward like any ColumnParallelLinear, so DDP's overlapped parameter gather waits in
    its pre-hook; the parameter keeps its name and attributes, and `weight` is handed in when it is tied.
    """

    def forward(  # type: ignore[override]
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        inputs: HeadInputs | None = None,
        vocab_size: int | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Return ([1 or 2, labelled] float32: log-probs and, if asked, entropies; None).

        input_ [tokens, 1, hidden], or this rank's [tokens / tp, 1, hidden] under sequence parallelism.
        Without `inputs` it is the ordinary projection to (vocabulary-parallel) logits.
        """
        if inputs is None:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        weight = self.weight if weight is None else weight
        # In effect under DistributedDataParallel: dW goes into main_grad unrounded, without a copy of its size.
        add_weight_gradient_to_main_grad(weight)
        if self.sequence_parallel:
            # The op all-reduces dX over the tensor-parallel group, so every rank holds the whole gradient and
            # the gather's backward only has to keep its own part.
            input_ = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=False, group=self.tp_group
            )
        hidden = input_.reshape(-1, input_.shape[-1]).index_select(0, inputs.rows)
        if inputs.few_rows:
            return few_row_logprob(
                hidden, weight, inputs.labels, vocab_size=vocab_size, tp_group=self.tp_group
            ).unsqueeze(0), None
        result = linear_logprob(
            hidden,
            weight,
            inputs.labels,
            inv_temperature=inputs.inv_temperature,
            vocab_size=vocab_size,
            tp_group=self.tp_group,
            with_entropy=inputs.with_entropy,
        )
        if inputs.with_entropy:
            return torch.stack([result.logprobs, result.entropy]), None
        return result.logprobs.unsqueeze(0), None


class PolicyModel(GPTModel):
    """GPTModel with a `LogProbHead` in place of the output layer."""

    def __init__(
        self,
        config: TransformerConfig,
        hf: PretrainedConfig,
        *,
        vocab_multiple: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        tensor = config.tensor_model_parallel_size
        padded = padded_vocab_size(hf.vocab_size, tensor, vocab_multiple)
        tied = bool(hf.tie_word_embeddings)
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
        self.rotary_pos_emb.inv_freq = hf_config.rope_inverse_frequencies(hf).to(
            self.rotary_pos_emb.inv_freq.device
        )
        if post_process:
            # Re-class instead of rebuild: allocation, initialisation, tying marks and the pipeline's embedding
            # group all stay exactly what GPTModel set up.
            self.output_layer.__class__ = LogProbHead
        self._head_inputs: HeadInputs | None = None
        _mark_shards(self)

    def forward(self, *args: Any, head_inputs: HeadInputs | None = None, **kwargs: Any) -> torch.Tensor:
        """GPTModel.forward; on the last stage [1 or 2, labelled] float32 when `head_inputs` is given."""
        self._head_inputs = head_inputs
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._head_inputs = None

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.post_process or self._head_inputs is None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        output, _ = self.output_layer(
            hidden_states, weight=weight, inputs=self._head_inputs, vocab_size=self.true_vocab_size
        )
        return output


def _mark_shards(model: torch.nn.Module) -> None:
    """Mark sharded weights as such; Megatron does it while initialising them, which is left out here.

    Without the marks the gradient norm counts a sharded weight on the first tensor-parallel rank only.
    Transformer Engine modules mark their own.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=1, stride=1)
