"""How many layers each pipeline stage has: `parallel.stage_layers` worked out.

A chunk is what one stage runs in one go: `virtual_pipeline` of them lie on each stage, and chunk i, in the order of the
layers, is on stage i % `pipeline` (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_laser.config.derived import longest_sequence
from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.model_folder.flops import attention_flops, layer_flops_per_token
from megatron_laser.config.schema.root import RunConfig


def chunk_layers(config: RunConfig, architecture: Architecture) -> tuple[int, ...]:
    """Layers of each chunk, [pipeline * virtual_pipeline], of a configuration without problems."""
    parallel, layers = config.parallel, architecture.num_layers
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.stage_layers == "even":
        return (layers // chunks,) * chunks
    if parallel.stage_layers == "balanced":
        return balanced_chunks(
            layers, parallel.pipeline, parallel.virtual_pipeline, head_layers(config, architecture)
        )
    return parallel.stage_layers


def head_layers(config: RunConfig, architecture: Architecture) -> float:
    """The vocabulary projection's matrix products, in layers: of the longest sequence, of which the response has labels
    (each of its tokens, and the score's)."""
    tokens = longest_sequence(config)
    layer = tokens * layer_flops_per_token(architecture) + attention_flops(architecture, tokens)
    labelled = config.rollout.max_new_tokens + 1
    return 2 * labelled * architecture.hidden_size * architecture.vocab_size / layer


def balanced_chunks(layers: int, stages: int, chunks_each: int, head: float) -> tuple[int, ...]:
    """Layers of each chunk, one or more, so that the slowest stage has as little work as possible.

    Args:
        head: what the last stage does besides its layers, in layers.
    """
    on_stage = [chunks_each] * stages
    work = [float(chunks_each)] * (stages - 1) + [chunks_each + head]
    for _ in range(layers - stages * chunks_each):
        # Of equals a late one: the first stages keep the activations of the most micro-batches.
        stage = min(range(stages), key=lambda s: (work[s], -s))
        on_stage[stage] += 1
        work[stage] += 1
    found = [0] * (stages * chunks_each)
    for stage, count in enumerate(on_stage):
        # What is left over goes to early chunks: the head is behind the last one.
        for chunk in range(chunks_each):
            found[chunk * stages + stage] = count // chunks_each + (chunk < count % chunks_each)
    return tuple(found)


def layers_per_stage(chunks: Sequence[int], stages: int) -> tuple[int, ...]:
    """Layers on each of `stages` pipeline stages, in all its chunks."""
    return tuple(sum(chunks[stage::stages]) for stage in range(stages))
