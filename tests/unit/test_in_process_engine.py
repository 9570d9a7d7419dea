"""The in-process engine against plain transformers forwards."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import save_tiny_model, tiny_model
from safetensors.torch import load_file, save_file

from megatron_laser.config import ModelFolderError
from megatron_laser.rollout import RolloutEngine
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.types import SamplingParams

SCORE = 249
# Large weights: a distribution with structure, so that top-p and temperature have something to do.
SCALE = 0.18
# A tenth of the vocabulary stops a response, so that short, long and truncated ones occur together.
STOPS = tuple(range(1, 250, 10))
SAMPLING = SamplingParams(
    samples_per_prompt=6, max_new_tokens=16, stop_token_ids=STOPS, seed=3, score_token_id=SCORE
)
PROMPTS = [[5, 9, 200], [7], [3, 3, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [100, 101], [60, 61, 62, 63, 64]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "model"
    save_tiny_model(folder, "qwen2", scale=SCALE)
    return folder


@pytest.fixture(scope="module")
def reference():
    return tiny_model("qwen2", scale=SCALE)


def make_engine(folder, max_batch_size=256):
    torch.set_num_threads(1)
    return InProcessEngine(
        folder, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=max_batch_size
    )


@pytest.fixture(scope="module")
def engine(folder):
    return make_engine(folder)


@pytest.fixture(scope="module")
def generations(engine):
    return engine.generate(PROMPTS, SAMPLING, deadline=60)


def flat(generations, prompts=PROMPTS):
    return [(prompt, one) for prompt, group in zip(prompts, generations) for one in group]


@torch.no_grad()
def logits_of(model, prompt, response):
    """[response + 1, vocab]: the row that predicts each response token, then the last row."""
    return model(torch.tensor([list(prompt) + list(response)])).logits[0, len(prompt) - 1 :]


def logprobs_of(model, prompt, response, temperature=1.0):
    rows = (logits_of(model, prompt, response)[:-1] / temperature).log_softmax(-1)
    return rows.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def test_it_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


def test_every_prompt_gets_its_samples_in_order(generations):
    assert [len(group) for group in generations] == [SAMPLING.samples_per_prompt] * len(PROMPTS)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_a_full_forward_at_the_sampling_temperature(engine, reference, temperature):
    out = engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature), deadline=60)
    for prompt, one in flat(out):
        expected = logprobs_of(reference, prompt, one.response_ids.tolist(), temperature)
        torch.testing.assert_close(torch.from_numpy(one.logprobs), expected, atol=1e-5, rtol=0)


def test_a_response_ends_at_its_first_stop_token_or_at_the_length_limit(generations):
    reasons = set()
    for _, one in flat(generations):
        reasons.add(one.finish_reason)
        assert not set(one.response_ids.tolist()[:-1]) & set(STOPS)
        assert len(one.logprobs) == len(one.response_ids) <= SAMPLING.max_new_tokens
        if one.finish_reason == "stop":
            assert one.response_ids.tolist()[-1] in STOPS
        else:
            assert one.finish_reason == "length"
            assert one.response_ids.tolist()[-1] not in STOPS
            assert len(one.response_ids) == SAMPLING.max_new_tokens
        assert one.is_scored(STOPS) == (one.finish_reason == "stop")
    assert reasons == {"stop", "length"}


def test_each_of_several_stop_tokens_ends_a_response(generations):
    used = {one.response_ids.tolist()[-1] for _, one in flat(generations) if one.finish_reason == "stop"}
    assert len(used) > 3


def test_a_stop_at_the_very_last_position_is_a_stop_and_has_a_score(engine, generations):
    one = next(g for _, g in flat(generations) if g.finish_reason == "stop")
    limit = len(one.response_ids)
    out = engine.generate(PROMPTS, replace(SAMPLING, max_new_tokens=limit), deadline=60)
    exact = [g for _, g in flat(out) if g.finish_reason == "stop" and len(g.response_ids) == limit]
    assert exact and all(g.zc_logprob is not None for g in exact)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_score_is_of_the_raw_logits_behind_the_stop_token(engine, reference, temperature):
    out = engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature), deadline=60)
    stopped = [(prompt, one) for prompt, one in flat(out) if one.finish_reason == "stop"]
    assert len(stopped) > 10
    scores = engine.score([prompt + one.response_ids.tolist() for prompt, one in stopped], SCORE, deadline=60)
    for (prompt, one), score in zip(stopped, scores):
        expected = logits_of(reference, prompt, one.response_ids.tolist())[-1].log_softmax(-1)[SCORE].item()
        assert one.zc_logprob == pytest.approx(expected, abs=1e-5)
        assert score == pytest.approx(expected, abs=1e-5)
    assert all(one.zc_logprob is None for _, one in flat(out) if one.finish_reason == "length")


def test_without_being_asked_no_response_has_a_score(engine):
    out = engine.generate(PROMPTS, replace(SAMPLING, score_token_id=None), deadline=60)
    assert all(one.zc_logprob is None for _, one in flat(out))
    assert {one.finish_reason for _, one in flat(out)} == {"stop", "length"}


def test_scores_do_not_depend_on_how_sequences_are_batched(folder, engine):
    sequences = [list(range(2, 2 + n)) for n in (1, 30, 4, 11, 2, 19, 7)]
    one_by_one = [engine.score([ids], SCORE, deadline=60)[0] for ids in sequences]
    assert engine.score(sequences, SCORE, deadline=60) == pytest.approx(one_by_one, abs=1e-5)
    small = make_engine(folder, max_batch_size=2)
    assert small.score(sequences, SCORE, deadline=60) == pytest.approx(one_by_one, abs=1e-5)


def test_greedy_equals_transformers_generate_in_batches_of_any_size(folder, reference):
    sampling = replace(SAMPLING, temperature=0.0, samples_per_prompt=2, max_new_tokens=12)
    for batch in (2, 6, 256):
        out = make_engine(folder, max_batch_size=batch).generate(PROMPTS, sampling, deadline=60)
        for prompt, group in zip(PROMPTS, out):
            ids = torch.tensor([prompt])
            expected = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=list(STOPS),
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for one in group:
                assert one.response_ids.tolist() == expected
                raw = logprobs_of(reference, prompt, expected)
                torch.testing.assert_close(torch.from_numpy(one.logprobs), raw, atol=1e-5, rtol=0)


def test_equal_seeds_give_equal_responses_and_other_seeds_do_not(folder, generations):
    def ids(seed):
        out = make_engine(folder).generate(PROMPTS, replace(SAMPLING, seed=seed), deadline=60)
        return [one.response_ids.tolist() for _, one in flat(out)]

    assert ids(3) == [one.response_ids.tolist() for _, one in flat(generations)]
    assert ids(4) != ids(3)


def test_samples_of_one_prompt_differ(generations):
    for group in generations:
        assert len({tuple(one.response_ids.tolist()) for one in group}) > 1


def nucleus(probabilities, top_p):
    """The smallest set of most probable tokens whose probability reaches top_p."""
    members, total = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: -probabilities[t]):
        if total >= top_p:
            break
        members.add(token)
        total += probabilities[token]
    return members


def test_sampling_never_leaves_the_nucleus_and_logprobs_are_those_before_it(engine, reference):
    temperature, top_p = 0.8, 0.6
    sampling = replace(SAMPLING, temperature=temperature, top_p=top_p)
    out = engine.generate(PROMPTS, sampling, deadline=60)
    for prompt, one in flat(out):
        rows = (logits_of(reference, prompt, one.response_ids.tolist())[:-1] / temperature).log_softmax(-1)
        for row, token, logprob in zip(rows, one.response_ids.tolist(), one.logprobs.tolist()):
            # A little wider than top_p: a token on the edge may fall on either side in float32.
            assert token in nucleus(row.double().exp().tolist(), top_p + 1e-5)
            assert logprob == pytest.approx(row[token].item(), abs=1e-5)


def chi_square(counts, probabilities):
    """Pearson's statistic over tokens with at least 5 expected draws, the rest in one bin; and its dof."""
    total = sum(counts)
    bins = [(c, total * p) for c, p in zip(counts, probabilities) if total * p >= 5]
    rest_count = total - sum(c for c, _ in bins)
    rest = total - sum(e for _, e in bins)
    if rest >= 5:
        bins.append((rest_count, rest))
    return sum((count - expected) ** 2 / expected for count, expected in bins), len(bins) - 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.5, 0.9)])
def test_first_tokens_are_drawn_from_the_models_distribution(folder, reference, temperature, top_p):
    draws, prompt = 4000, PROMPTS[0]
    sampling = SamplingParams(draws, 1, (), temperature=temperature, top_p=top_p, seed=11)
    (group,) = make_engine(folder, max_batch_size=draws).generate([prompt], sampling, deadline=60)
    tokens = torch.tensor([one.response_ids.tolist()[0] for one in group])
    counts = torch.bincount(tokens, minlength=250).tolist()
    probabilities = (logits_of(reference, prompt, [])[-1].double() / temperature).softmax(-1).tolist()
    kept = nucleus(probabilities, top_p)
    mass = sum(probabilities[token] for token in kept)
    expected = [p / mass if token in kept else 0.0 for token, p in enumerate(probabilities)]
    statistic, dof = chi_square(counts, expected)
    assert dof > 5
    # mean + 3.5 standard deviations of the chi-square distribution; the seed is fixed
    assert statistic < dof + 3.5 * math.sqrt(2 * dof)
    wrong, _ = chi_square(counts, (torch.ones(250) / 250).tolist())
    assert wrong > 3 * statistic


def test_on_finished_reports_each_response_once_as_it_is_returned(folder):
    engine = make_engine(folder, max_batch_size=12)  # two prompts at a time
    seen = {}

    def on_finished(prompt, sample, generation):
        assert (prompt, sample) not in seen
        seen[prompt, sample] = generation

    out = engine.generate(PROMPTS, SAMPLING, deadline=60, on_finished=on_finished)
    assert len(seen) == len(PROMPTS) * SAMPLING.samples_per_prompt
    assert all(seen[p, s] is one for p, group in enumerate(out) for s, one in enumerate(group))


def test_shorter_responses_are_reported_before_longer_ones(engine):
    lengths = []
    engine.generate(
        PROMPTS, SAMPLING, deadline=60, on_finished=lambda p, s, g: lengths.append(len(g.response_ids))
    )
    assert lengths == sorted(lengths)


def test_a_deadline_that_passes_raises_with_the_number_of_running_responses(engine):
    with pytest.raises(TimeoutError, match=r"30 of 30 responses"):
        engine.generate(PROMPTS, SAMPLING, deadline=0.0)
    with pytest.raises(TimeoutError, match="scored 0 of 2 sequences"):
        engine.score([[1], [2]], SCORE, deadline=-1.0)


@pytest.mark.parametrize("bad", [250, -1])
def test_ids_outside_the_vocabulary_are_refused_before_anything_runs(engine, bad):
    with pytest.raises(ValueError, match=r"prompt 1 .*vocabulary of 250"):
        engine.generate([[3], [4, bad]], SAMPLING, deadline=60)
    with pytest.raises(ValueError, match="vocabulary of 250"):
        engine.score([[3, bad]], SCORE, deadline=60)
    with pytest.raises(ValueError, match="score token"):
        engine.score([[3]], bad, deadline=60)
    with pytest.raises(ValueError, match="score token"):
        engine.generate([[3]], replace(SAMPLING, score_token_id=bad), deadline=60)


def test_empty_and_too_long_prompts_are_refused(engine):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.generate([[]], SAMPLING, deadline=60)
    with pytest.raises(ValueError, match=r"rollout\.max_new_tokens 16 .*max_position_embeddings 256"):
        engine.generate([[2] * 241], SAMPLING, deadline=60)


def other_weights():
    return dict(tiny_model("qwen2", seed=9, scale=SCALE).named_parameters())


def test_an_update_changes_all_weights_and_the_version(folder):
    engine = make_engine(folder)
    assert engine.version == 0
    engine.update_weights(iter(other_weights().items()), 7)
    assert engine.version == 7
    (group,) = engine.generate([PROMPTS[0]], SAMPLING, deadline=60)
    other = tiny_model("qwen2", seed=9, scale=SCALE)
    for one in group:
        assert one.weight_version == 7
        expected = logprobs_of(other, PROMPTS[0], one.response_ids.tolist())
        torch.testing.assert_close(torch.from_numpy(one.logprobs), expected, atol=1e-5, rtol=0)


def test_tied_weights_are_updated_by_the_embedding_alone(tmp_path):
    save_tiny_model(tmp_path, "qwen2-tied")
    engine = make_engine(tmp_path)
    other = tiny_model("qwen2-tied", seed=9)
    engine.update_weights(other.named_parameters(), 1)
    expected = logits_of(other, PROMPTS[0], [])[-1].log_softmax(-1)[SCORE].item()
    assert engine.score([PROMPTS[0]], SCORE, deadline=60)[0] == pytest.approx(expected, abs=1e-5)


def test_updates_with_missing_unknown_or_misshapen_tensors_are_refused_and_keep_the_version(folder):
    engine = make_engine(folder)
    good = other_weights()
    missing = {name: tensor for name, tensor in good.items() if "layers.3.mlp.up_proj" not in name}
    with pytest.raises(KeyError, match=r"version 1.*lacked.*layers\.3\.mlp\.up_proj"):
        engine.update_weights(missing.items(), 1)
    with pytest.raises(KeyError, match=r"version 2.*no parameter 'model\.extra'"):
        engine.update_weights([*good.items(), ("model.extra", torch.ones(1))], 2)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"version 3.*up_proj.*\(1, 64\).*\(96, 64\)"):
        engine.update_weights((good | {name: good[name][:1]}).items(), 3)  # would broadcast
    assert engine.version == 0


def test_the_weights_are_not_mapped_from_the_file_that_somebody_may_cut_off(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    engine = make_engine(copy)
    assert str(copy) not in Path("/proc/self/maps").read_text()
    engine.close()


def test_closing_twice_is_safe(folder):
    engine = make_engine(folder)
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lm_head.weight": None}, "lm_head.weight is missing"),  # transformers would make one up
        ({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}, "up_proj.bias"),
        ({"model.norm.weight": torch.ones(65)}, r"\[65\], expected \[64\]"),
        (
            {"model.norm.weight": torch.full((64,), -math.inf)},
            r"model.norm.weight\); use weights from before",
        ),
    ],
)
def test_weights_that_are_not_those_of_config_json_are_refused(folder, tmp_path, change, named):
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | change
    save_file(
        {name: t for name, t in tensors.items() if t is not None}, tmp_path / "model" / "model.safetensors"
    )
    with pytest.raises(ModelFolderError, match=named):
        make_engine(tmp_path / "model")


COMMON = list(range(20, 60))


def test_a_common_beginning_is_computed_once_and_changes_nothing(engine, reference, monkeypatch):
    prompts = [[*COMMON, 5], [*COMMON, 6, 7, 8], [*COMMON, 5, 9], COMMON]
    seen = []
    forward = engine._model.forward
    monkeypatch.setattr(
        engine._model, "forward", lambda **inputs: seen.append(inputs["input_ids"].shape) or forward(**inputs)
    )
    generations = engine.generate(prompts, SAMPLING, deadline=60)
    assert seen[:2] == [(1, 39), (4, 4)]
    for prompt, one in flat(generations, prompts):
        ids = torch.tensor([[*prompt, *one.response_ids]])
        logprobs = reference(input_ids=ids).logits[0].float().log_softmax(-1)
        chosen = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert one.logprobs.tolist() == pytest.approx(chosen.tolist(), abs=2e-5)
        if one.finish_reason == "stop":
            assert one.zc_logprob == pytest.approx(logprobs[-1, SCORE].item(), abs=2e-5)
