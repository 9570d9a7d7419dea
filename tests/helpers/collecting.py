"""A collector over a stepping engine whose responses have the lengths that `varied` gives, for rollout tests."""

from helpers.stepping_engine import STOP, Grading, SteppingEngine
from megatron_laser.data import PromptCursor
from megatron_laser.observability.timers import Timers
from megatron_laser.rollout.collector import RolloutCollector
from megatron_laser.types import Prompt, SamplingParams

PROMPTS = [Prompt(row, "", "", [100 + row]) for row in range(40)]


def varied(prompt, sample):
    """Lengths from 3 to 13 without a pattern; some responses are much longer than others."""
    return 3 + (7 * prompt + 5 * sample) % 11


def collector(engine=None, grading=None, samples=2, **settings):
    defaults = dict(oversample=1.5, max_staleness=3, ahead=0, tries=None, prompts_per_step=4)
    return RolloutCollector(
        engine or SteppingEngine(varied),
        grading or Grading(),
        PROMPTS,
        PromptCursor(len(PROMPTS), 5, True),
        sampling=SamplingParams(samples, 64, (STOP,)),
        decode=lambda ids: " ".join(map(str, ids)),
        deadline=60.0,
        seed=3,
        timers=Timers(),
        **defaults | settings,
    )


def rows(batch):
    return [group.prompt.row for group in batch.groups]


def spans_of(batches):
    return [[sample.generation.spans for sample in batch.samples()] for batch in batches]
