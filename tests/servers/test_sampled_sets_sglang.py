"""A real server's sets: the log-probs over them are those of the trainer, and of transformers in float64."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.ranks import train_on_ranks
from transformers import AutoModelForCausalLM

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.engine import StopEarly
from megatron_laser.types import SamplingParams

# its start counts as part of the first test that asks for it
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

EOS = 1
PROMPTS = [[5, 24, 6, 27], [7, 24, 8, 27], [9]]
# The random model is nearly uniform: the temperature makes nuclei of different sizes.
SAMPLING = SamplingParams(8, 24, (EOS,), temperature=0.05, top_p=0.8, top_k=20, seed=1)


@pytest.fixture
def engine(sglang_server):
    engine = SglangEngine.connect(
        [sglang_server.url],
        api_key=sglang_server.api_key,
        expected=Expected(28, "qwen2", "float32"),
        deadline=60.0,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def weights(sglang_server):
    """Put into the server from a folder, so that nothing depends on what other tests left there."""
    sglang_server.call("/pause_generation", {"mode": "abort"})
    sglang_server.call("/update_weights_from_disk", {"model_path": str(sglang_server.model)})
    sglang_server.call("/continue_generation", {})
    return AutoModelForCausalLM.from_pretrained(sglang_server.model, dtype=torch.float64)


def rows_of(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return (logits / SAMPLING.temperature).log_softmax(-1)


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_each_token_comes_with_the_most_probable_tokens_and_its_log_prob_among_them(engine, weights, min_p):
    sampling = replace(SAMPLING, min_p=min_p)
    sizes = []
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, sampling, deadline=60), strict=True):
        for one in group:
            rows = rows_of(weights, prompt, one.response_ids.tolist())
            bounds = np.concatenate(([0], np.cumsum(one.sets.counts)))
            assert len(rows) == len(one.sets)
            for row, token, logprob, first, last in zip(
                rows, one.response_ids, one.logprobs, bounds[:-1], bounds[1:], strict=True
            ):
                members = one.sets.ids[first:last].tolist()
                probabilities = row.exp()
                least, others = probabilities[members].min(), np.setdiff1d(range(28), members)
                # In float32 either of two that are alike may be the last one.
                assert len(members) <= 20 and least > probabilities[others].max() - 1e-5
                assert probabilities[members].sum() - least < 0.8 + 1e-5
                assert least > min_p * probabilities.max() - 1e-5
                among = row[token] - row[members].logsumexp(0)
                assert logprob == pytest.approx(among.item(), abs=1e-5)
                sizes.append(len(members))
    assert len(set(sizes)) > 2


def test_an_aborted_response_keeps_the_sets_of_what_it_has_and_goes_on(engine, weights):
    sampling = SamplingParams(4, 50, (), top_p=0.9, top_k=20)
    # One in about thirty tokens ends a response: with the first that ends, the others are on their way, as a rule.
    for _ in range(20):
        stop = StopEarly()
        parts = engine.generate_some(
            PROMPTS, sampling, deadline=60, on_finished=lambda *finished, stop=stop: stop.set(), stop=stop
        )
        known = {
            (p, s): one for p, group in enumerate(parts) for s, one in enumerate(group) if one is not None
        }
        if any(one.finish_reason == "abort" and 0 < len(one.sets) < 50 for one in known.values()):
            break
    else:
        pytest.fail("no response of twenty times was aborted on its way")
    whole = engine.generate_some(PROMPTS, sampling, deadline=60, resume=known)
    for group in whole:
        for one in group:
            assert one.finish_reason in ("length", "stop") and len(one.sets) == len(one.response_ids) > 0
            assert one.sets.first_without(one.response_ids) is None


def test_a_run_trains_on_what_was_sampled(sglang_server, tmp_path):
    folder = tmp_path / "out"
    train_on_ranks(
        sglang_server.run_file,
        "rollout.engine=sglang",
        f"rollout.sglang.endpoints={sglang_server.endpoints}",
        "rollout.sglang.device=cpu",
        "laser.max_unscored_steps=null",  # whether a response ends is chance
        *("rollout.top_p=0.9", "rollout.top_k=20", "rollout.temperature=0.05"),
        *("policy.mismatch_abort=0.001", "run.steps=3", f"run.output_dir={folder}"),
        timeout=200,
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "policy_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["logprob_diff_max"] < 3e-5
