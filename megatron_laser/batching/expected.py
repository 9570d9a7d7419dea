"""What a dry run says of balance: the schedule of a step that has not happened, for responses of random length."""

from __future__ import annotations

import random

from megatron_laser.batching.schedule import Schedule, build_schedule
from megatron_laser.config.derived import longest_sequence, micro_batch_tokens, padded_tokens, pipeline_bubble
from megatron_laser.config.model_folder.continuation import longest_trained
from megatron_laser.config.model_folder.flops import forward_flops
from megatron_laser.config.plan.resolve import Plan
from megatron_laser.config.stages import head_layers

_MOST_SEQUENCES = 16384  # beyond it a dry run would take longer than it is worth


def balance_lines(plan: Plan) -> list[str]:
    """Sentences on data-parallel ranks and pipeline stages; none where nothing is shared out.

    Responses have random lengths, all from 1 to `rollout.max_new_tokens` alike, and prompts half of
    `data.max_prompt_tokens`: real ones are known once a run is under way, whose `rank_imbalance` and `pipeline_bubble`
    are of what it trains on.
    """
    config, layout = plan.config, plan.layout
    if plan.batch.sequences > _MOST_SEQUENCES or layout.data * layout.pipeline == 1:
        return []
    lines = []
    schedules = {balance: _schedule(plan, balance) for balance in ("tokens", "flops")}
    schedule, costs = schedules[config.batching.balance]
    if layout.data > 1:
        other = "flops" if config.batching.balance == "tokens" else "tokens"
        lines.append(
            f"responses of random length, 1 to {config.rollout.max_new_tokens:,} tokens alike: the busiest of "
            f"{layout.data} data-parallel ranks works {schedule.imbalance(costs):.1%} longer than the mean "
            f"(batching.balance {config.batching.balance}; {other}: {schedules[other][0].imbalance(costs):.1%})"
        )
    if layout.pipeline > 1:
        counts = [schedule.num_micro_batches(number) for number in range(config.policy.minibatches)]
        stages = layout.layers(plan.architecture.num_layers)
        work = [float(layers) for layers in stages]
        work[-1] += head_layers(config, plan.architecture)
        lines.append(
            f"pipeline stages of {', '.join(map(str, stages))} layers, the last one's head worth "
            f"{work[-1] - stages[-1]:.1f}: the slowest works {max(work) / (sum(work) / len(work)) - 1:.1%} longer than "
            f"the mean; a stage waits {pipeline_bubble(config.parallel, counts):.1%} of a step of "
            f"{sum(counts) // len(counts):,} micro-batches"
        )
    return lines


def _schedule(plan: Plan, balance: str) -> tuple[Schedule, list[float]]:
    """The schedule under `batching.balance`, and the cost of each sample in FLOPs."""
    config, rollout = plan.config, plan.config.rollout
    numbers = random.Random(0)
    responses = [numbers.randint(1, rollout.max_new_tokens) for _ in range(plan.batch.sequences)]
    # Behind the longest alone, which are cut off, stands the text that readouts force.
    forced = longest_trained(config) - longest_sequence(config)
    lengths = [
        max(1, config.data.max_prompt_tokens // 2)
        + response
        + (forced if response == rollout.max_new_tokens else 0)
        for response in responses
    ]
    costs = [
        float(forward_flops(plan.architecture, length, response))
        for length, response in zip(lengths, responses, strict=True)
    ]
    schedule = build_schedule(
        [padded_tokens(length, config.parallel) for length in lengths],
        data_parallel=plan.layout.data,
        tokens_per_micro_batch=micro_batch_tokens(config),
        minibatches=config.policy.minibatches,
        group_ids=[sample // rollout.samples_per_prompt for sample in range(plan.batch.sequences)],
        micro_batch_multiple=plan.layout.pipeline if plan.layout.virtual_pipeline > 1 else 1,
        costs=costs if balance == "flops" else None,
    )
    return schedule, costs
