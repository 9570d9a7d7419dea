"""Sections for looking into a run and for trying one out: windows of a profiler, made-up weights and responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from megatron_laser.config.schema.fields import (
    RUNNING,
    Count,
    CountOrZero,
    NonNegative,
    Section,
    identity,
)


def _window(value: Any) -> Any:
    if value is None:
        return value
    steps = [value] if type(value) is int else value
    if not isinstance(steps, list | tuple) or not 1 <= len(steps) <= 2:
        raise ValueError("expected [first, last], the first and the last step of the window")
    if any(type(step) is not int or step < 1 for step in steps) or steps[0] > steps[-1]:
        raise ValueError("expected [first, last], two steps of 1 or more in their order")
    return (steps[0], steps[-1])


def _ranks(value: Any) -> Any:
    if value == "all":
        return value
    ranks = [value] if type(value) is int else value
    if not isinstance(ranks, list | tuple) or not ranks:
        raise ValueError("expected all or a list of ranks")
    if any(type(rank) is not int or rank < 0 for rank in ranks):
        raise ValueError("expected all or a list of ranks, 0 or more")
    return tuple(sorted(set(ranks)))


ProfiledSteps = Annotated[tuple[Count, Count] | None, BeforeValidator(_window)]
ProfiledRanks = Annotated[Literal["all"] | tuple[CountOrZero, ...], BeforeValidator(_ranks)]


class ProfileConfig(Section):
    """Windows in which torch's profiler is on. Nothing that is computed depends on them."""

    changing = RUNNING

    steps: ProfiledSteps = None
    """The first and the last step of a window, both in it: `[10, 12]` are three steps. null: none but those that are
    asked for while the run goes on (`kill -USR2` of a rank, `megatron-laser profile`)."""
    ranks: ProfiledRanks = (0,)
    """Ranks that write a trace, `output_dir`/profile/steps_A-B.rank_N.trace.json.gz, in this window and in those that
    are asked for; or `all`."""
    memory: bool = False
    """Where the memory went, too: on CUDA the allocator's history, steps_A-B.rank_N.memory.pickle for
    https://pytorch.org/memory_viz; on a CPU allocations in the trace."""
    asked_steps: Count = 1
    """Steps of a window that `kill -USR2` asks for."""


class FakeConfig(Section):
    """Made-up inputs for a trial of a layout, of its time and its memory: nothing is learned, and the run says so in
    its name (FAKE), at its start and at its end."""

    changing = identity("a trial with made-up inputs and a run that learns are two runs")

    weights: bool = False
    """Random weights of the shape of config.json in place of the model's: no weight files are needed. With servers it
    needs `responses`, too."""
    responses: bool = False
    """Made-up prompts, responses and grades: no servers, no graders, no data and, where `laser.score_token` is an id,
    no tokenizer. The settings of `rollout` say how many, and how long they may be."""
    prompt_tokens: Count | None = None
    """With `responses`: mean length of a prompt; null: half of `data.max_prompt_tokens`."""
    response_tokens: Count | None = None
    """With `responses`: mean length of a response before the longest are cut off at `rollout.max_new_tokens`; null: a
    quarter of that."""
    spread: NonNegative = 0.7
    """With `responses`: standard deviation of the logarithm of a response's length, whose distribution is log-normal:
    0 is one length, 0.7 has one in twenty above 2.5 times the mean."""
