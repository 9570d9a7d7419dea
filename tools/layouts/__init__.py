"""The layouts that compare_layouts.py trains under, by the number of processes."""

from __future__ import annotations

OVERLAPPED = [
    "optimizer.distributed=true",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
]
BUDGETS = (4096, 160, 80)


def _one_process(words: str = "", *overrides: str) -> dict[str, list[str]]:
    return {
        f"1 process, {budget} tokens{words}": [f"batching.tokens_per_micro_batch={budget}", *overrides]
        for budget in BUDGETS
    }


# processes -> {name: overrides}; the first entry of all is the reference.
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {**_one_process(", own prompts", "batching.share_prompts=false"), **_one_process()},
    2: {
        **{f"data 2, {budget} tokens": [f"batching.tokens_per_micro_batch={budget}"] for budget in BUDGETS},
        "data 2, distributed optimizer": ["optimizer.distributed=true"],
        "data 2, distributed, overlapped": [
            *OVERLAPPED,
        ],
        "tensor 2": ["parallel.tensor=2"],
        "tensor 2, own prompts": ["parallel.tensor=2", "batching.share_prompts=false"],
        "tensor 2, 80 tokens": ["parallel.tensor=2", "batching.tokens_per_micro_batch=80"],
        "tensor 2, sequence": ["parallel.tensor=2", "parallel.sequence=true"],
        "pipeline 2, 160 tokens": ["parallel.pipeline=2", "batching.tokens_per_micro_batch=160"],
        "pipeline 2": ["parallel.pipeline=2"],
        "pipeline 2 x virtual 2": [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "batching.tokens_per_micro_batch=160",
        ],
        "pipeline 2 of 1 and 3 layers": [
            "parallel.pipeline=2",
            "parallel.stage_layers=[1, 3]",
            "batching.tokens_per_micro_batch=160",
        ],
        "pipeline 2, balanced, offloaded": [
            "parallel.pipeline=2",
            "parallel.stage_layers=balanced",
            "model.recompute=full",
            "model.offload_activations=true",
            "optimizer.offload=true",
            "batching.tokens_per_micro_batch=80",
        ],
        "data 2, distributed, overlapped, offloaded, 1 layer recomputed": [
            *OVERLAPPED,
            "optimizer.offload=true",
            "model.recompute=full",
            "model.recompute_layers=1",
        ],
        "context 2": ["parallel.context=2"],
        "context 2, 80 tokens": ["parallel.context=2", "batching.tokens_per_micro_batch=80"],
        "context 2, distributed optimizer": ["parallel.context=2", "optimizer.distributed=true"],
        "context 2, recompute": ["parallel.context=2", "model.recompute=full"],
    },
    4: {
        "tensor 2 x pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2"],
        "tensor 2 x data 2": ["parallel.tensor=2"],
        "tensor 2 x data 2, sequence, distributed": [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "optimizer.distributed=true",
        ],
        "pipeline 2 x data 2, 80 tokens": ["parallel.pipeline=2", "batching.tokens_per_micro_batch=80"],
        "context 4": ["parallel.context=4"],
        "context 4, 80 tokens": ["parallel.context=4", "batching.tokens_per_micro_batch=80"],
        "context 2 x tensor 2": ["parallel.context=2", "parallel.tensor=2"],
        "context 2 x tensor 2, sequence": [
            "parallel.context=2",
            "parallel.tensor=2",
            "parallel.sequence=true",
        ],
        "context 2 x pipeline 2": [
            "parallel.context=2",
            "parallel.pipeline=2",
            "batching.tokens_per_micro_batch=80",
        ],
        "context 2 x data 2": ["parallel.context=2"],
        "context 2 x tensor 2, sequence, offloaded": [
            "parallel.context=2",
            "parallel.tensor=2",
            "parallel.sequence=true",
            "model.recompute=full",
            "model.offload_activations=true",
        ],
    },
}
# Of a model with experts, in place of those above.
EXPERT_LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: _one_process(),  # which share no prompts
    2: {
        "data 2": [],
        "data 2, distributed optimizer": ["optimizer.distributed=true"],
        "expert 2": ["parallel.expert=2"],
        "expert 2, 80 tokens": ["parallel.expert=2", "batching.tokens_per_micro_batch=80"],
        "expert 2, distributed optimizer": ["parallel.expert=2", "optimizer.distributed=true"],
        "expert 2, recompute": ["parallel.expert=2", "model.recompute=full"],
        "expert 2, recompute experts": ["parallel.expert=2", "model.recompute=mlp"],
        "pipeline 2, recompute experts": [
            "parallel.pipeline=2",
            "model.recompute=mlp",
            "batching.tokens_per_micro_batch=80",
        ],
        "expert 2 within tensor 2": ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"],
        "expert tensor 2": ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert_tensor=2"],
        "tensor 2, whole experts": ["parallel.tensor=2", "parallel.sequence=true"],
        "pipeline 2 x virtual 2": [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "batching.tokens_per_micro_batch=160",
        ],
        "expert 2 within context 2": ["parallel.context=2", "parallel.expert=2"],
        "expert 2, distributed, offloaded": [
            "parallel.expert=2",
            "optimizer.distributed=true",
            "optimizer.offload=true",
            "model.recompute=full",
            "model.offload_activations=true",
        ],
    },
    4: {
        "expert 2 x data 2": ["parallel.expert=2"],
        "expert 2 x data 2, distributed": ["parallel.expert=2", "optimizer.distributed=true"],
        "expert 2 x tensor 2": ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"],
        "expert 4 within tensor 2 x data 2": [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.expert=4",
        ],
        "expert 2 x expert tensor 2": [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.expert=2",
            "parallel.expert_tensor=2",
        ],
        "expert 2 x pipeline 2": [
            "parallel.expert=2",
            "parallel.pipeline=2",
            "batching.tokens_per_micro_batch=80",
        ],
        "expert 2 x context 2": ["parallel.expert=2", "parallel.context=2"],
    },
}
# Of a model of six layers, in place of those above: chunks of an interleaved pipeline with different numbers of layers.
UNEVEN_LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"1 process": []},
    2: {
        f"pipeline 2 x virtual 2 of {' + '.join(map(str, layers))}": [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            f"parallel.stage_layers={layers}",
            "batching.tokens_per_micro_batch=160",
            *more,
        ]
        for layers, more in (
            ([2, 1, 1, 2], []),
            ([1, 3, 1, 1], ["model.recompute=full", "model.offload_activations=true"]),
            ([2, 2, 1, 1], ["model.recompute=full", "model.recompute_layers=1", "optimizer.offload=true"]),
        )
    },
}
