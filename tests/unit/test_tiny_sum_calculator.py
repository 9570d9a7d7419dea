"""The small example's calculator: it writes the sum that the policy asks for, and nothing else."""

import sys
from types import SimpleNamespace

import pytest
from helpers.source_tree import ROOT

from megatron_laser.data.tokenizer import load_tokenizer
from megatron_laser.rollout.function.runner import SampleFunction
from megatron_laser.types import Generation, Prompt, SamplingParams

EXAMPLE = ROOT / "examples" / "tiny_sum"


class Reciting:
    """The policy says `line`, each time from where the response has got to, until it is stopped."""

    version = 0

    def __init__(self, line, prompt):
        self.line, self.begins = line, len(prompt)

    def generate(self, prompts, sampling, *, deadline, stop):
        found = []
        for ids in prompts:
            said = self.line[len(ids) - self.begins :][: sampling.max_new_tokens]
            ends = next((n + 1 for n, token in enumerate(said) if token in sampling.stop_token_ids), None)
            reason = "length" if ends is None else "stop"
            found.append([Generation(said[:ends], [-0.1] * len(said[:ends]), reason, 0)])
        return found


@pytest.mark.parametrize(
    ("said", "text", "written"),
    [
        ("3+5+9=16,\\boxed{359}<|end|>", "3+5+9=17,\\boxed{359}", ["17"]),  # it would have added wrongly
        ("3+=8,\\boxed{359}<|end|>", "3+=?,\\boxed{359}", ["?"]),
        ("2+1=9+4=9,\\boxed{3}<|end|>", "2+1=3+4=7,\\boxed{3}", ["3", "7"]),
        ("9+9+9=9<|end|>", "9+9+9=?", ["?"]),  # 27 is no token
        ("1<|end|>", "1", []),
        ("1+1+1+1+1+1+1+1=2", "1+1+1+1+1+1+1+1=", []),  # 16 tokens: no room for a sum
    ],
)
def test_it_writes_sums_and_the_policy_goes_on(said, text, written):
    tokenizer = load_tokenizer(EXAMPLE / "tokenizer")
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    prompt = Prompt(
        0, "", "", tokenizer("Which 3 digits of 3859 add up to 17?", add_special_tokens=False)["input_ids"]
    )
    function = SampleFunction(
        f"{EXAMPLE}/calculator.py:calculator",
        Reciting(ids, prompt.token_ids),
        options={},
        deadline=10.0,
        tokenizer=tokenizer,
        vocab_size=40,
        longest=32,
        max_positions=64,
        score_token_id=None,
    )
    found = []
    try:
        function.generate(
            [prompt],
            SamplingParams(1, 16, (tokenizer.eos_token_id,)),
            deadline=20.0,
            on_finished=lambda p, s, generation: found.append(generation),
            on_failed=lambda p, s, kind: found.append(SimpleNamespace(failed=kind)),
        )
    finally:
        function.close()
        if str(EXAMPLE) in sys.path:
            sys.path.remove(str(EXAMPLE))
    (generation,) = found
    assert tokenizer.decode(generation.text_ids) == text
    mask = generation.sampled_mask
    assert [tokenizer.decode([token]) for token in generation.response_ids[~mask]] == written
