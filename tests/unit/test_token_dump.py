"""What a dump says of each token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_laser.observability.rollout_dump import TokenPart, dump_rollouts
from megatron_laser.observability.token_dump import TokenValues, significant, token_ends
from megatron_laser.trainer.run_readouts import ReadoutScores, readings_by_sample
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample


def test_values_are_rounded_to_five_significant_digits_and_written_short() -> None:
    values = [-0.123456789, 0.0, -12345678.0, 1.00004e-7, math.nan, -math.inf, 1e-30, np.float32(-0.1)]
    assert significant(values) == [-0.12346, 0.0, -12346000.0, 1.0e-7, None, None, 1e-30, -0.1]
    rng = np.random.default_rng(0)
    many = -rng.exponential(1, 1000) * 10.0 ** rng.integers(-8, 4, 1000)
    assert [f"{float(f'{value:.5g}')!r}" for value in many] == [repr(value) for value in significant(many)]


def byte_tokenizer() -> Tokenizer:
    """One token a byte, as byte-level tokenizers have for what they do not know, and some longer ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "the", "Ġtext"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def test_each_token_ends_where_its_text_does_and_a_character_of_several_at_the_last_of_them() -> None:
    tokenizer = byte_tokenizer()
    number = tokenizer.token_to_id

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    smile = [number(token) for token in tokenizer.pre_tokenizer.pre_tokenize_str("😀")[0][0]]
    ids = [number("the"), number("Ġtext"), *smile, number("<eos>"), number("a"), number("the")]
    text = decode(ids)
    assert text == "the text😀athe" and len(smile) == 4
    assert token_ends(text, ids, len(ids) + 1, decode) == [3, 8, 8, 8, 8, 9, 9, 10, 13, 13]
    assert token_ends(decode(ids[:2]), ids[:2], 3, decode) == [3, 8, 8]
    assert token_ends("", [], 1, decode) == [0] and token_ends("", [], 0, decode) == []
    broken = [number("the"), smile[0], number("a"), smile[0]]  # bytes that never become a character
    ends = token_ends(decode(broken), broken, 4, decode)
    assert ends == sorted(ends) and ends[-1] == len(decode(broken)) and ends[0] == 3


def test_blanks_between_words_belong_to_the_word_that_follows() -> None:
    words = {1: "two", 2: "+", 3: "five"}
    text = "two + five two"
    ends = token_ends(text, [1, 2, 3, 1], 5, lambda ids: " ".join(words[token] for token in ids))
    assert ends == [3, 5, 10, 14, 14]


def batch() -> RolloutBatch:
    asked = Generation([3, 4, 0], [-0.5, -1.5, -2.5], "stop", 4, sampled=np.array([True, False, True]))
    samples = [
        Sample([1, 2], asked, "cd", True, 1.0, "correct", -3.0),
        Sample([1, 2], Generation([3], [-1.0], "length", 4), "c", False, 0.0, "wrong"),
    ]
    lost = Sample([1, 2], Generation([4], [-1.0], "stop", 4), "", False, outcome="timeout")
    return RolloutBatch(5, 4, [Group(Prompt(7, "problem", "42", [1, 2]), samples, [lost])])


def decode(ids: list[int]) -> str:
    return "".join("?abcd"[token] for token in ids)


def test_each_response_gets_its_own_values_and_one_without_a_grade_none_of_the_trainers(
    tmp_path: Path,
) -> None:
    path = tmp_path / "step_5.jsonl"
    values = TokenValues(
        np.array([-0.4, np.nan, -2, -9], np.float32), np.array([1, np.nan, 2, 3], np.float32)
    )
    read = ReadoutScores(
        "parts", False, np.array([0, 0, 1]), np.array([1, 3, 1]), _tensor([0.25, math.nan, 0.5])
    )
    part = TokenPart(values, readings_by_sample([read], 2), decode)
    dump_rollouts(path, batch(), [0.75, None], [0.5, -0.5], part)
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first["prompt"] == "ab" and first["token_ends"] == [1, 2, 2]
    assert first["token_logprobs"] == [-0.5, None, -2.5]  # an environment wrote the second
    assert first["token_policy_logprobs"] == [-0.4, None, -2.0] and first["token_entropy"] == [1.0, None, 2.0]
    assert first["readouts"] == {"parts": [[1, 0.25], [3, None]]}
    assert second["token_policy_logprobs"] == [-9.0] and second["readouts"] == {"parts": [[1, 0.5]]}
    assert (third["token_policy_logprobs"], third["token_entropy"], third["readouts"]) == (None, None, {})
    assert third["token_logprobs"] == [-1.0]


def test_without_tokens_a_dump_is_as_it_was(tmp_path: Path) -> None:
    dump_rollouts(tmp_path / "a", batch(), [0.75, None], [0.5, -0.5])
    for line in (tmp_path / "a").read_text().splitlines():
        assert "prompt" not in json.loads(line) and "token_ends" not in json.loads(line)


def test_a_trainer_that_read_nothing_leaves_the_engines_values(tmp_path: Path) -> None:
    dump_rollouts(tmp_path / "a", batch(), [0.75, None], [0.5, -0.5], TokenPart(None, [{}, {}], decode))
    first = json.loads((tmp_path / "a").read_text().splitlines()[0])
    assert first["token_policy_logprobs"] is None and first["token_logprobs"][0] == -0.5


def _tensor(values: list[float]) -> object:
    torch = pytest.importorskip("torch")
    return torch.tensor(values)
