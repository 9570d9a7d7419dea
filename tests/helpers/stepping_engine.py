"""A resumable engine in memory that makes one token of every open response at a time, so that stops fall anywhere."""

from concurrent.futures import Future

from megatron_laser.rewards import Grade
from megatron_laser.types import Generation, WeightSpan

STOP = 1


class SteppingEngine:
    """Response s to prompt [p] is p, 10 + s, then 5s up to its length, then STOP.

    Attributes:
        version: of its weights.
        length: (p, s) -> tokens, STOP included.
        tokens: made so far; calls: (p, s, what it had already) of each response that was begun or resumed.
        interrupt: token number -> an exception to raise before that token.
        seeds: of each call.
    """

    def __init__(self, length):
        self.version = 0
        self.length = length
        self.tokens = 0
        self.calls = []
        self.interrupt = {}
        self.seeds = []
        self.deadlines = []

    def generate(self, prompts, sampling, *, deadline, on_finished=None):
        return self.generate_some(prompts, sampling, deadline=deadline, on_finished=on_finished)

    def generate_some(self, prompts, sampling, *, deadline, on_finished=None, resume=None, stop=None):
        self.seeds.append(sampling.seed)
        self.deadlines.append(deadline)
        stopped = []
        if stop is not None:
            stop.on_set(lambda: stopped.append(True))
        size = sampling.samples_per_prompt
        found = [[(resume or {}).get((p, s)) for s in range(size)] for p in range(len(prompts))]
        waiting = [
            (p, s)
            for p in range(len(prompts))
            for s in range(size)
            if found[p][s] is None or found[p][s].finish_reason == "abort"
        ]
        for p, s in waiting:
            had = 0 if found[p][s] is None else len(found[p][s].response_ids)
            if not stopped:
                self.calls.append((prompts[p][0], s, had))
        while waiting and not stopped:
            for p, s in list(waiting):
                if stopped:
                    break
                if self.tokens in self.interrupt:
                    raise self.interrupt.pop(self.tokens)
                self.tokens += 1
                found[p][s] = self._longer(prompts[p][0], s, found[p][s])
                if found[p][s].finish_reason == "stop":
                    waiting.remove((p, s))
                    if on_finished is not None:
                        on_finished(p, s, found[p][s])
        return found

    def _longer(self, prompt, sample, before):
        ids = [] if before is None else before.response_ids
        spans = () if before is None else before.spans
        length = self.length(prompt, sample)
        token = STOP if len(ids) + 1 == length else [prompt, 10 + sample, *[5] * length][len(ids)]
        if spans and spans[-1].version == self.version:
            spans = (*spans[:-1], WeightSpan(self.version, spans[-1].tokens + 1))
        else:
            spans = (*spans, WeightSpan(self.version, 1))
        ids = [*ids, token]
        reason = "stop" if token == STOP else "abort"
        return Generation(ids, [-0.5] * len(ids), reason, spans[0].version, spans=spans)

    def score(self, sequences, token_id, *, deadline):
        return [-1.0 for _ in sequences]

    def update_weights(self, weights, version):
        self.version = version

    def take_metrics(self):
        return {"rollout/servers": 1.0}

    def close(self):
        return None


class Grading:
    """At once. `uniform`: prompts whose responses are all right; the others have a right and wrong ones.

    graded: (prompt, sample) of every call. held: grades of these prompts come only when `let_go` is called.
    """

    def __init__(self, uniform=(), held=()):
        self.uniform, self.held = set(uniform), set(held)
        self.graded = []
        self.waiting = []

    def submit(self, text, answer, facts=None):
        prompt, sample = (int(word) for word in text.split()[:2])
        self.graded.append((prompt, sample - 10))
        right = prompt in self.uniform or sample == 10
        future = Future()
        grade = Grade(float(right), "correct" if right else "wrong")
        if prompt in self.held:
            self.waiting.append((future, grade))
        else:
            future.set_result(grade)
        return future

    def let_go(self):
        for future, grade in self.waiting:
            future.set_result(grade)
        self.waiting.clear()
