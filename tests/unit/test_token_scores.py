"""Several tokens at one place are read in one pass: the same numbers as one by one, with fewer forwards or requests."""

import pytest
import torch
from helpers.faulty_server import SCORE, FaultyServer, open_engine
from helpers.models import save_tiny_model

from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.rollout.client.errors import ServerError
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.rollout.sglang_api import WireError, parse_score
from megatron_laser.rollout.token_scores import token_scores

SEQUENCES = [[3, 4, 5, 1], [7, 1], [9, 8, 7, 6, 5, 1], [2, 2, 1], [11, 1]]
TOKENS = [30, 4, 17]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "qwen2")
    return InProcessEngine(folder, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=2)


@pytest.fixture
def forwards(engine, monkeypatch):
    """Sizes of the batches that the model reads."""
    seen, prefill = [], engine.prefill
    monkeypatch.setattr(
        engine,
        "prefill",
        lambda part, cache, **more: (seen.append(len(part)), prefill(part, cache, **more))[1],
    )
    return seen


def test_one_forward_reads_all_tokens_of_a_batch(engine, forwards):
    one_by_one = [engine.score(SEQUENCES, token, deadline=60) for token in TOKENS]
    assert forwards == [2, 2, 1] * 3
    forwards.clear()
    assert token_scores(engine, SEQUENCES, TOKENS, deadline=60) == [list(row) for row in zip(*one_by_one)]
    assert forwards == [2, 2, 1]
    logits = engine._model(torch.tensor([SEQUENCES[2]])).logits[0, -1].double().log_softmax(0)
    found = engine.score_tokens(SEQUENCES[2:3], TOKENS, deadline=60)
    assert found[0] == pytest.approx(logits[TOKENS].tolist(), abs=1e-5)


def test_a_pair_is_judged_with_half_of_the_forwards(engine, forwards):
    rule = ScoreRule((30, 4), None, 0.1, kind="pair_sigmoid")
    found = rule.read(engine, SEQUENCES, deadline=60)
    assert forwards == [2, 2, 1]
    first, second = (engine.score(SEQUENCES, token, deadline=60) for token in (30, 4))
    assert found == pytest.approx([a - b for a, b in zip(first, second)], abs=1e-6)


def test_an_engine_that_reads_one_token_is_asked_once_for_each():
    asked = []

    class Own:
        def score(self, sequences, token_id, *, deadline):
            asked.append(token_id)
            return [-float(token_id + len(sequence)) for sequence in sequences]

    assert token_scores(Own(), [[1], [1, 2]], [5, 6], deadline=1.0) == [[-6.0, -7.0], [-7.0, -8.0]]
    assert asked == [5, 6]
    with pytest.raises(TimeoutError, match="scoring took more than -1 s"):
        token_scores(Own(), [[1]], [5, 6], deadline=-1.0)


def test_bad_ids_among_several_are_refused(engine):
    with pytest.raises(ValueError, match="score token id 100000 is outside the vocabulary"):
        engine.score_tokens(SEQUENCES, [4, 100000], deadline=60)


@pytest.fixture
def server():
    server = FaultyServer()
    yield server
    server.stop()


def test_servers_get_one_request_for_all_tokens_of_a_sequence(server):
    client = open_engine(server)
    try:
        found = client.score_tokens(SEQUENCES[:2], [SCORE, 5, 9], deadline=20.0)
        assert found == [[-7.5, -8.5, -9.5]] * 2
        assert [body["token_ids_logprob"] for body in server.requests] == [[SCORE, 5, 9]] * 2
        assert client.score(SEQUENCES[:2], 5, deadline=20.0) == [-7.5] * 2
        with pytest.raises((ValueError, ServerError), match="100000"):
            client.score_tokens(SEQUENCES[:1], [SCORE, 100000], deadline=20.0)
        assert len(server.requests) == 4
    finally:
        client.close()


def test_an_answer_about_other_tokens_is_none():
    entries = [[-7.5, 2, None], [-1.5, 3, None]]
    body = {"meta_info": {"output_token_ids_logprobs": [entries], "weight_version": "w", "prompt_tokens": 3}}
    assert parse_score(body, 3, 2, prompt_tokens=3).logprobs == (
        -1.5,
        -7.5,
    )  # by id, in the order of the question
    for wanted in ((2,), (2, 4), (2, 3, 4)):
        with pytest.raises(WireError, match="instead of"):
            parse_score(body, *wanted, prompt_tokens=3)
    entries[1][0] = None
    with pytest.raises(WireError, match="expected a number"):
        parse_score(body, 2, 3, prompt_tokens=3)
