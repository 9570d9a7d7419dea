"""The tokens that each token was sampled from: drawn, asked for, read, joined, kept, flattened, and given to rows."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.faulty_server import LENGTH, STOP, FaultyServer, open_engine
from helpers.models import save_tiny_model, tiny_model
from helpers.rollouts import rollout_batch

from megatron_laser.batching.context import context_shard
from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.batching.packing import pack
from megatron_laser.model import platform
from megatron_laser.rollout.client.responses import joined
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.rollout.pending import generation_from, generation_state
from megatron_laser.rollout.sampled_sets import parse_sets
from megatron_laser.rollout.sglang_api import Reply, WireError
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, Sample, SamplingParams, TokenSets

platform.install()

from megatron_laser.trainer.row_sets import row_sets  # noqa: E402

STOPS = tuple(range(1, 250, 10))
SAMPLING = SamplingParams(4, 12, STOPS, temperature=0.8, top_p=0.7, top_k=12, min_p=0.05, seed=3)
PROMPTS = [[5, 9, 200], [7], [3, 3, 40, 41], [100, 101]]


def token_sets(*members):
    return TokenSets(
        np.array([len(one) for one in members], np.int32),
        np.array([i for one in members for i in one], np.int32),
    )


def as_lists(sets):
    return [part.tolist() for part in np.split(sets.ids, np.cumsum(sets.counts)[:-1])] if len(sets) else []


# the in-process engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "model"
    save_tiny_model(folder, "qwen2", scale=0.18)
    torch.set_num_threads(1)
    return InProcessEngine(folder, dtype=torch.float32, device=torch.device("cpu"))


def by_hand(row, sampling):
    """The set of a row of float64 log-probs: SGLang's filters, one token after another; and the margin of its edges."""
    probabilities = row.exp().tolist()
    order = sorted(range(len(probabilities)), key=lambda t: -probabilities[t])
    first, before, members, margin = probabilities[order[0]], 0.0, set(), 1.0
    for token in order[: sampling.top_k]:
        p = probabilities[token]
        margin = min(margin, abs(before - sampling.top_p), abs(p - sampling.min_p * first))
        if before < sampling.top_p and p >= sampling.min_p * first:
            members.add(token)
        before += p
    return members, margin


@pytest.mark.parametrize("filters", [{}, {"top_p": 1.0, "min_p": 0.0}, {"top_k": 3}, {"min_p": 0.4}])
def test_each_token_comes_with_its_set_and_its_log_prob_in_it(engine, filters):
    reference, sampling = tiny_model("qwen2", scale=0.18).double(), replace(SAMPLING, **filters)
    sizes = []
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, sampling, deadline=60), strict=True):
        for one in group:
            response = one.response_ids.tolist()
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            rows = (logits / sampling.temperature).log_softmax(-1)
            for row, token, logprob, members in zip(
                rows, response, one.logprobs, as_lists(one.sets), strict=True
            ):
                expected, margin = by_hand(row, sampling)
                assert set(members) == expected or margin < 1e-6
                assert token in members and len(members) == len(set(members))
                among = row[token] - row[members].logsumexp(0)
                assert logprob == pytest.approx(among.item(), abs=1e-5)
                sizes.append(len(members))
    assert min(sizes) < max(sizes) or (filters.get("top_p") == 1.0 and set(sizes) == {12})


def test_tokens_are_drawn_in_proportion_within_the_set(engine):
    draws = 3000
    engine._max_batch_size, before = draws, engine._max_batch_size
    ((*group,),) = engine.generate(PROMPTS[:1], SamplingParams(draws, 1, (), top_k=4, seed=5), deadline=60)
    engine._max_batch_size = before
    for token in group[0].sets.ids.tolist():
        own = [one for one in group if one.response_ids[0] == token]
        p = float(np.exp(own[0].logprobs[0]))
        assert abs(len(own) - draws * p) < 4 * (draws * p * (1 - p)) ** 0.5
    assert sum(np.exp(list({float(one.logprobs[0]) for one in group}))) == pytest.approx(1.0, abs=1e-5)


def test_greedy_decoding_has_sets_of_one_and_log_prob_0(engine):
    ((one,),) = engine.generate(
        PROMPTS[:1], replace(SAMPLING, temperature=0.0, samples_per_prompt=1), deadline=60
    )
    plain = replace(SAMPLING, temperature=0.0, samples_per_prompt=1, top_k=None, top_p=1.0, min_p=0.0)
    ((same,),) = engine.generate(PROMPTS[:1], plain, deadline=60)
    assert one.response_ids.tolist() == same.response_ids.tolist() == one.sets.ids.tolist()
    assert not one.logprobs.any() and same.sets is None


def test_min_p_alone_leaves_out_what_is_improbable(engine):
    sampling = replace(SAMPLING, top_k=None, top_p=1.0, min_p=0.9, temperature=1.0)
    greedy = replace(sampling, temperature=0.0, min_p=0.0)
    (some,), (best,) = (engine.generate(PROMPTS[:1], one, deadline=60) for one in (sampling, greedy))
    assert some[0].sets is None and some[0].response_ids[0] == best[0].response_ids[0]


# servers


@pytest.fixture
def server():
    server = FaultyServer()
    yield server
    server.stop()


ASKS = SamplingParams(2, 8, (STOP,), top_p=0.9, top_k=20, min_p=0.1)


def test_a_server_is_asked_for_sets_and_told_how_to_sample(server):
    engine = open_engine(server)
    try:
        ((one, _),) = engine.generate([[4, 5]], ASKS, deadline=20.0)
        ((plain, _),) = engine.generate([[4, 5]], replace(ASKS, top_k=None, min_p=0.0), deadline=20.0)
    finally:
        engine.close()
    asked, unasked = server.generations[0], server.generations[-1]
    assert asked["return_sampling_mask"] is True and "return_sampling_mask" not in unasked
    found = {name: asked["sampling_params"][name] for name in ("top_p", "top_k", "min_p")}
    assert found == {"top_p": 0.9, "top_k": 20, "min_p": 0.1}
    assert not {"top_k", "min_p"} & set(unasked["sampling_params"])
    assert one.logprobs.tolist() == [-0.25] * LENGTH and plain.logprobs.tolist() == [-0.5] * LENGTH
    assert as_lists(one.sets) == [[7, 5, 8], [8, 5, 9], [9, 5, 10], [1, 5, 2]] and plain.sets is None


@pytest.mark.parametrize("fault", ["a token is not in its set", "no sets"])
def test_an_answer_without_its_sets_is_asked_for_again(server, fault):
    server.faults.append(fault)
    engine = open_engine(server)
    try:
        ((one, _),) = engine.generate([[4, 5]], ASKS, deadline=20.0)
        assert engine.take_metrics()["rollout/retries"] == 1.0
    finally:
        engine.close()
    assert len(one.sets) == LENGTH


@pytest.mark.parametrize(
    ("sets", "logprobs", "said"),
    [
        ([[7, 5]], [-0.5, -0.5], "2 output_ids but 1 sets"),
        ([[7, 5], [8]], [-0.5], "1 output_token_sampling_logprobs"),
        ([[7, 5], [5, 9]], [-0.5, -0.5], "lacks token 8 itself"),
        ([[7, 5], []], [-0.5, -0.5], "no member for token 1"),
        ([[7, 28], [8]], [-0.5, -0.5], "no token id below 28"),
        ([[7, True], [8]], [-0.5, -0.5], "no token id below 28"),
        ([7, 8], [-0.5, -0.5], "expected a list of ids for each token"),
        ([[7], [8]], [-0.5, None], "expected a number for each token"),
        ([[7], [8]], [-0.5, float("nan")], "expected a number for each token"),
        ([[7], [8]], [[-0.5], [-0.5]], "expected a number for each token"),
    ],
)
def test_sets_that_cannot_be_are_refused(sets, logprobs, said):
    meta = {"output_token_sampling_mask": sets, "output_token_sampling_logprobs": logprobs}
    with pytest.raises(WireError, match=said):
        parse_sets({"meta_info": meta}, np.array([7, 8], np.int32), 28)


def test_a_request_that_was_aborted_in_the_queue_has_none():
    sets, logprobs = parse_sets({"meta_info": {}}, np.zeros(0, np.int32), 28)
    assert len(sets) == len(sets.ids) == len(logprobs) == 0


def test_a_resumed_response_keeps_its_sets_and_what_had_none_was_sampled_from_everything():
    def reply(*ids):
        logprobs = np.full(len(ids), -0.5, np.float32)
        return Reply(np.array(ids, np.int32), logprobs, "abort", "v", ("v",), 3, 2)

    first = joined(None, reply(7, 8), 3, ASKS, None, token_sets([7, 5], [8]))
    second = joined(first, reply(9), 4, ASKS, None, token_sets([9, 6]))
    assert as_lists(second.sets) == [[7, 5], [8], [9, 6]]
    assert joined(joined(None, reply(7), 3, ASKS), reply(8), 4, ASKS).sets is None
    mixed = joined(joined(None, reply(7, 8), 3, ASKS), reply(9), 4, ASKS, None, token_sets([9, 6]))
    assert as_lists(mixed.sets) == [[], [], [9, 6]]
    assert as_lists(joined(mixed, reply(5), 5, ASKS).sets) == [[], [], [9, 6], []]


# kept, sent, and given to rows


def test_a_checkpoint_gives_a_response_its_sets_back():
    one = Generation([7, 1], [-0.5, -0.5], "stop", 3, sets=token_sets([7, 5], [1]))
    again = generation_from(json.loads(json.dumps(generation_state(one))))
    assert as_lists(again.sets) == [[7, 5], [1]] and again.sets.ids.dtype == np.int32
    older = {name: value for name, value in generation_state(one).items() if name != "sets"}
    assert generation_from(older).sets is None


def batch(*generations):
    samples = [Sample([1, 2], one, "", True, 1.0, "correct") for one in generations]
    return RolloutBatch(12, 3, [Group(Prompt(0, "", "", [1, 2]), samples)])


def test_a_batch_carries_the_sets_of_all_tokens_and_nothing_where_there_is_none():
    some = Generation([7, 1], [-0.5, -0.5], "stop", 3, sets=token_sets([7, 5], [1]))
    none = Generation([8, 9, 1], [-0.5] * 3, "stop", 3)
    flat = FlatBatch.from_arrays(flatten(batch(none, some)).to_arrays())
    assert flat.set_counts.tolist() == [0, 0, 0, 2, 1] and flat.set_ids.tolist() == [7, 5, 1]
    plain = flatten(batch(none))
    assert not {"set_counts", "set_ids"} & set(
        plain.to_arrays()
    )  # as before there were sets, and read as such
    assert not len(FlatBatch.from_arrays(plain.to_arrays()).set_counts)
    for sets in (token_sets([7]), token_sets([7], [2])):
        with pytest.raises(ValueError, match=r"sample 1 of step 12 has 2 response ids and . sets"):
            flatten(batch(none, replace(some, sets=sets)))
    with pytest.raises(ValueError, match="set_ids has shape"):
        replace(flat, set_ids=flat.set_ids[1:])


@pytest.mark.parametrize("context", [1, 2])
def test_rows_of_a_packed_micro_batch_have_the_sets_of_their_labels(context):
    """Whatever the order of samples, the sharing of prompts and the share of a context rank."""
    from helpers.rollouts import R, T, W

    flat = rollout_batch([[R(5), W(3)], [T(4), R(2)]], seed=1)
    ids = np.concatenate([flat.response_ids(i) for i in range(4)])
    # Of every third token nothing is known; the others' sets are the token, and as many more as its place says.
    members = [[] if t % 3 == 1 else [int(i), *range(t % 4)] for t, i in enumerate(ids)]
    sets = token_sets(*members)
    flat = replace(flat, set_counts=sets.counts, set_ids=sets.ids)
    packed = pack(
        [flat.pack_input(i) for i in (2, 1, 3, 0)],
        score_token_id=249,
        pad_multiple=4 * context,
        inv_temperature=1.0,
        context_size=context,
        share_prompts=context == 1,
    )
    seen = 0
    for rank in range(context):
        own = context_shard(packed, size=context, rank=rank)
        found = row_sets(flat, own, torch.device("cpu"))
        assert sorted([*found.rows, *found.others]) == list(range(len(own.labels)))
        assert set(np.flatnonzero(own.is_score)) <= set(found.others)
        bounds = found.sets.offsets.tolist()
        for row, first, last in zip(found.rows, bounds[:-1], bounds[1:], strict=True):
            token = flat.response_offsets[own.sample_index[row]] + own.response_position[row]
            assert (
                found.sets.ids[first:last].tolist() == members[token] and members[token][0] == own.labels[row]
            )
            seen += 1
    assert seen == sum(map(bool, members))
    assert row_sets(rollout_batch([[R(5)]]), own, torch.device("cpu")) is None
