"""Functions of the user's that make samples, over an engine that counts and notes what it is asked."""

import textwrap
import threading
from contextlib import contextmanager

from megatron_laser.rollout.function.runner import SampleFunction
from megatron_laser.types import Generation, Prompt, SamplingParams

STOP = 1
SAMPLING = SamplingParams(2, 8, (STOP,))
PROMPT = Prompt(3, "two and two", "4", [10, 11])


def write(folder, code, name="env.py"):
    path = folder / name
    path.write_text(textwrap.dedent(code))
    return path


class CountingEngine:
    """Blocks for each call, like the in-process engine. A response counts on from its last id, and ends in STOP behind
    16; a call is answered within `seconds`."""

    def __init__(self):
        self.version = 4
        self.calls = []  # (prompts, limit, stop ids, seed) of each
        self.error = None
        self.entered = threading.Event()

    def generate(self, prompts, sampling, *, deadline, on_finished=None, stop=None):
        assert sampling.samples_per_prompt == 1 and sampling.score_token_id is None
        self.calls.append((list(prompts), sampling.max_new_tokens, sampling.stop_token_ids, sampling.seed))
        self.entered.set()
        if self.error is not None:
            raise self.error
        return [[self._one(ids, sampling)] for ids in prompts]

    def _one(self, ids, sampling):
        made = []
        while len(made) < sampling.max_new_tokens:
            made.append(ids[-1] + len(made) + 1 if ids[-1] + len(made) < 16 else STOP)
            if made[-1] in sampling.stop_token_ids:
                return Generation(made, [-0.5] * len(made), "stop", self.version)
        return Generation(made, [-0.5] * len(made), "length", self.version)

    def score(self, sequences, token_id, *, deadline):
        return [-float(len(ids)) for ids in sequences]


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


@contextmanager
def made_functions(folder):
    """Makes functions of code, whose files are in `folder`; closes them."""
    made = []

    def make(code, engine=None, *, deadline=20.0, options=None, **settings):
        path = write(folder, code, f"env_{len(made)}.py")
        defaults = dict(tokenizer=Words(), vocab_size=28, longest=40, max_positions=64, score_token_id=2)
        made.append(
            SampleFunction(
                f"{path}:f",
                engine or CountingEngine(),
                options=options or {},
                deadline=deadline,
                **defaults | settings,
            )
        )
        return made[-1]

    try:
        yield make
    finally:
        for function in made:
            function.close()


def samples(function, prompts=(PROMPT,), sampling=SAMPLING, *, deadline=30.0, skip=(), stop=None):
    """(prompt, sample) -> what it came to."""
    found = {}
    function.generate(
        list(prompts),
        sampling,
        deadline=deadline,
        on_finished=lambda p, s, generation: found.update({(p, s): generation}),
        on_failed=lambda p, s, kind: found.update({(p, s): kind}),
        skip=skip,
        stop=stop,
    )
    return found
