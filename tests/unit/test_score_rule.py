"""How an evaluation reads a run's first readout: the same number as the trainer's."""

import math

import pytest
import torch

from megatron_laser.algorithms.readouts import readout_scores
from megatron_laser.config import load_config
from megatron_laser.evaluation.benchmarks.folder import RECORDS, claim_benchmark_folder
from megatron_laser.evaluation.score_rule import ScoreRule


class Engine:
    """log pi(token | sequence) = -token / 10 - length / 7; notes what was asked for."""

    def __init__(self):
        self.asked = []

    def score(self, sequences, token_id, *, deadline):
        assert deadline > 0
        self.asked.append((token_id, [len(sequence) for sequence in sequences]))
        return [-token_id / 10 - len(sequence) / 7 for sequence in sequences]


def rule(folder, readout):
    file = folder / "run.yaml"
    file.write_text(
        f"model: {{path: {folder}/model}}\ndata: {{train: {folder}/train.jsonl}}\n"
        f"laser: {{score_token: 7, ref_logprob: -9.0, beta: 0.5, readouts: [{readout}]}}\n"
        f"run: {{steps: 3, output_dir: {folder}/run}}\n"
    )
    return ScoreRule.of(load_config(file), 7)


@pytest.mark.parametrize(
    ("readout", "kind", "tokens"),
    [
        ("{}", "scaled_logratio", [7]),
        ("{tokens: [7, 9], loss: bce}", "scaled_logratio", [7]),
        ("{tokens: [7, 9], score: pair_sigmoid, targets: [0.9, 0.1]}", "pair_sigmoid", [7, 9]),
        ("{tokens: [7, 8, 9], score: normalised}", "normalised", [7, 8, 9]),
    ],
)
def test_a_score_is_the_trainers_of_the_same_log_probs(tmp_path, readout, kind, tokens):
    engine, found = Engine(), rule(tmp_path, readout)
    sequences = [[1, 2, 3], [1, 2, 3, 4, 5]]
    values = found.read(engine, sequences, deadline=5.0)
    assert [token for token, _ in engine.asked] == tokens
    logprobs = torch.tensor([[-t / 10 - len(s) / 7 for t in tokens] for s in sequences], dtype=torch.float64)
    expected = readout_scores(
        logprobs,
        kind=kind,
        beta=0.5,
        ref_logprob=-9.0,
        targets=(0.9, 0.1) if "0.9" in readout else (1.0, 0.0),
    )
    assert [found.score(value) for value in values] == pytest.approx(expected.tolist())


def test_before_the_end_is_read_without_the_last_token(tmp_path):
    engine, found = Engine(), rule(tmp_path, "{position: before_eos}")
    assert not found.is_plain and rule(tmp_path, "{}").is_plain
    found.read(engine, [[1, 2, 3]], deadline=5.0)
    assert engine.asked == [(7, [2])]


def test_without_a_reference_a_log_prob_makes_no_score_and_a_pair_does():
    assert ScoreRule((7,), None, 0.1).score(-3.0) is None
    assert ScoreRule((7, 8), None, 0.1, kind="pair_sigmoid").score(math.log(3.0)) == pytest.approx(0.75)
    assert ScoreRule((7, 8), None, 0.1, kind="pair_sigmoid").score(None) is None


def test_an_evaluation_judges_anew_when_another_readout_is_read(tmp_path):
    """From one token to a pair, to another share of it, and back."""
    plain = {"model": "m", "score_token_id": 7}
    pair = plain | {"readout": {"token_ids": [7, 9], "kind": "pair_sigmoid", "before_end": False}}
    share = plain | {"readout": pair["readout"] | {"kind": "normalised"}}
    claim_benchmark_folder(tmp_path, plain, regrade=False)
    for settings in (pair, share, plain):
        (tmp_path / RECORDS).write_text("")
        told = claim_benchmark_folder(tmp_path, settings, regrade=False)
        assert told == "readout changed: judging the saved responses anew"
        assert not (tmp_path / RECORDS).exists()
    (tmp_path / RECORDS).write_text("")
    assert claim_benchmark_folder(tmp_path, plain, regrade=False) == ""
    assert (tmp_path / RECORDS).exists()
