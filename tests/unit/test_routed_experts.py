"""Where an engine sent tokens: asked for, read, joined, kept, flattened; and the in-process engine's own."""

import base64
import json
import logging
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.faulty_server import HELD, LENGTH, STOP, FaultyServer, open_engine, routes
from helpers.models import chosen_experts, disk_tensors, save_tiny_model, tiny_model

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.rollout.client.errors import ServerMismatch
from megatron_laser.rollout.engine import StopEarly
from megatron_laser.rollout.in_process import InProcessEngine
from megatron_laser.rollout.pending import generation_from, generation_state
from megatron_laser.rollout.routed_experts import parse_routing
from megatron_laser.rollout.sglang_api import WireError
from megatron_laser.types import Generation, Group, Prompt, RolloutBatch, RoutingShape, Sample, SamplingParams

SHAPE = RoutingShape(layers=3, experts_per_token=2, num_experts=8)
EXPERTS = (3, 2, 8)
PROMPTS = [[4, 5], [4, 6, 5]]
SAMPLING = SamplingParams(2, 8, (STOP,), routing=SHAPE)


def answer(array):
    return {
        "meta_info": {
            "routed_experts": base64.b64encode(np.asarray(array, dtype=np.int32).tobytes()).decode()
        }
    }


def test_experts_are_read_in_their_smallest_type():
    array = routes(EXPERTS, 0, 5)
    read = parse_routing(answer(array), SHAPE, tokens=5)
    assert read.dtype == np.uint8 and np.array_equal(read, array)
    many = RoutingShape(3, 2, 300)
    read = parse_routing(answer(array + 290), many, tokens=5)
    assert read.dtype == np.int16 and np.array_equal(read, array + 290)
    assert parse_routing({"meta_info": {}}, SHAPE, tokens=5) is None
    assert len(parse_routing(answer(array[:0]), SHAPE, tokens=5)) == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (answer(np.zeros((6, 3, 2))), "36 routed_experts: expected 5 tokens x 3 layers x 2 experts"),
        (answer(np.zeros(7)), "7 routed_experts"),
        (answer(np.full((5, 3, 2), 8)), "from 8 to 8: the model has experts 0 to 7"),
        (answer(np.full((5, 3, 2), -1)), "from -1 to -1"),
        (
            answer(np.zeros((5, 3, 2))),
            "send token 0 of layer 0 to expert 0 twice: .*--moe-runner-backend triton",
        ),
        (
            answer(np.where(np.arange(3)[:, None] == 2, 0, routes(EXPERTS, 1, 6))),
            "token 0 of layer 2 to expert 0 twice",
        ),
        ({"meta_info": {"routed_experts": "AAA"}}, "no int32 in base64"),
        ({"meta_info": {"routed_experts": [1, 2]}}, "no int32 in base64"),
    ],
)
def test_experts_of_another_model_are_no_answer(body, said):
    with pytest.raises(WireError, match=said):
        parse_routing(body, SHAPE, tokens=5)


@pytest.fixture
def server():
    server = FaultyServer()
    server.experts = EXPERTS
    yield server
    server.stop()


@pytest.fixture
def engine(server):
    engine = open_engine(server)
    yield engine
    engine.close()


def test_every_response_comes_with_the_experts_of_all_tokens_that_were_fed(server, engine):
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, SAMPLING, deadline=20.0)):
        for generation in group:
            fed = len(prompt) + LENGTH - 1
            assert np.array_equal(generation.routed_experts, routes(EXPERTS, 0, fed))
    assert all(body["routed_experts_start_len"] == 0 for body in server.generations)


def test_a_router_which_would_drop_the_field_is_passed_by(server):
    between = FaultyServer()
    engine = open_engine(server, router_url=between.url)
    try:
        ((generation, _),) = engine.generate(PROMPTS[:1], SAMPLING, deadline=20.0)
        assert generation.routed_experts is not None and not between.requests
        engine.generate(PROMPTS[:1], replace(SAMPLING, routing=None), deadline=20.0)
        assert len(between.requests) == 2
    finally:
        engine.close()
        between.stop()


def test_nobody_asks_for_a_dense_model(server, engine):
    (group,) = engine.generate(PROMPTS[:1], replace(SAMPLING, routing=None), deadline=20.0)
    assert all(generation.routed_experts is None for generation in group)
    assert not any("return_routed_experts" in body for body in server.generations)


def test_a_server_that_gives_none_is_named_once_and_counted(server, engine, caplog):
    server.experts = None
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            groups = engine.generate(PROMPTS, SAMPLING, deadline=20.0)
    assert all(generation.routed_experts is None for group in groups for generation in group)
    (said,) = [record.getMessage() for record in caplog.records if "routed experts" in record.getMessage()]
    assert server.url in said and "--enable-return-routed-experts" in said
    assert engine.take_metrics()["rollout/unrouted_responses"] == 8.0


def test_experts_of_another_model_end_the_run_at_once(server, engine):
    sampling = replace(SAMPLING, routing=RoutingShape(3, 2, 2))
    with pytest.raises(ServerMismatch, match=f"{server.url}.*routed_experts from 0 to"):
        engine.generate(PROMPTS[:1], sampling, deadline=60.0)
    assert engine.take_metrics()["rollout/retries"] == 0.0


def test_a_response_with_too_few_experts_is_counted(server, engine):
    server.experts_short = 1
    ((generation, _),) = engine.generate(PROMPTS[:1], SAMPLING, deadline=20.0)
    assert len(generation.routed_experts) == len(PROMPTS[0]) + LENGTH - 2
    assert engine.take_metrics()["rollout/unrouted_responses"] == 2.0


@pytest.mark.parametrize("tells", [True, False])
def test_a_response_that_goes_on_asks_for_what_is_not_known(server, engine, tells):
    """What an aborted answer tells is kept, and only the rest asked for; else the next is asked for all."""
    server.tells_aborted = tells
    server.holds = lambda body: True
    stop = StopEarly()

    def end():
        server.wait_for(lambda: len(server.generations) == 2)
        stop.set()

    threading.Thread(target=end).start()
    first = engine.generate_some(PROMPTS[:1], SAMPLING, deadline=20.0, stop=stop)
    partial = first[0][0]
    assert partial.finish_reason == "abort" and len(partial.response_ids) == HELD
    had = len(PROMPTS[0]) + HELD - 1 if tells else 0
    if tells:
        assert np.array_equal(partial.routed_experts, routes(EXPERTS, 0, had))
        assert partial.routed_experts.dtype == np.uint8
    else:
        assert partial.routed_experts is None
    partial = generation_from(json.loads(json.dumps(generation_state(partial))))
    server.holds = lambda body: False
    known = replace(partial, routed_experts=routes(EXPERTS, 0, 2).astype(np.uint8))
    resume = {(0, 0): partial, (0, 1): known}
    server.requests.clear()
    (group,) = engine.generate_some(PROMPTS[:1], SAMPLING, deadline=20.0, resume=resume)
    fed = len(PROMPTS[0]) + LENGTH - 1
    for generation in group:
        assert np.array_equal(generation.routed_experts, routes(EXPERTS, 0, fed))
    assert sorted(body["routed_experts_start_len"] for body in server.generations) == sorted([had, 2])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_a_checkpoint_keeps_them_bit_by_bit(dtype):
    generation = Generation(
        [7, 1], [-0.5, -0.5], "stop", 3, routed_experts=routes(EXPERTS, 0, 4).astype(dtype)
    )
    state = json.loads(json.dumps(generation_state(generation)))
    again = generation_from(state)
    assert again == generation
    assert again.routed_experts.dtype == dtype
    assert np.array_equal(again.routed_experts, generation.routed_experts)
    older = {
        name: value for name, value in generation_state(replace(generation, routed_experts=None)).items()
    }
    del older["routed_experts"]
    assert generation_from(older).routed_experts is None


def batch(*routed):
    result = RolloutBatch(step=1, weight_version=0)
    group = Group(Prompt(0, "", "", [4, 5]), [])
    for one in routed:
        generation = Generation([7, 8, 1], [-0.5] * 3, "stop", 0, routed_experts=one)
        group.samples.append(Sample([4, 5], generation, "", True, 1.0, "correct"))
    result.groups.append(group)
    return result


def test_a_flat_batch_has_them_one_sample_after_the_other():
    first, third = routes(EXPERTS, 0, 4).astype(np.uint8), routes(EXPERTS, 2, 5).astype(np.uint8)
    flat = flatten(batch(first, None, third))
    assert flat.routed_tokens.tolist() == [4, 0, 3]
    assert flat.routed_offsets.tolist() == [0, 4, 4, 7]
    assert flat.routed_experts.dtype == np.uint8
    assert np.array_equal(flat.routed_experts, np.concatenate([first, third]).reshape(7, 6))
    again = FlatBatch.from_arrays(flat.to_arrays())
    assert np.array_equal(again.routed_experts, flat.routed_experts)
    assert np.array_equal(again.routed_tokens, flat.routed_tokens)
    wide = flatten(batch(first.astype(np.int16), None, None))
    assert FlatBatch.from_arrays(wide.to_arrays()).routed_experts.dtype == np.int16


def test_a_flat_batch_without_them_is_empty_there():
    flat = flatten(batch(None, None))
    assert flat.routed_tokens.tolist() == [0, 0] and flat.routed_experts.shape == (0, 0)
    assert FlatBatch.from_arrays(flat.to_arrays()).routed_experts.shape == (0, 0)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([6, 1], "of sample 0 is 6: expected 0 to its 5 tokens"),
        ([8, -1], "of sample 0 is 8"),
        ([4, -1], "of sample 1 is -1"),
        ([4, 4], r"shape \(7, 6\): expected one row for each of the 8"),
    ],
)
def test_a_flat_batch_with_other_counts_is_refused(counts, said):
    first, second = routes(EXPERTS, 0, 4).astype(np.uint8), routes(EXPERTS, 2, 5).astype(np.uint8)
    arrays = flatten(batch(first, second)).to_arrays()
    with pytest.raises(ValueError, match=said):
        FlatBatch.from_arrays(arrays | {"routed_tokens": np.array(counts, np.int32)})


def test_a_flat_batch_of_before_has_none():
    arrays = flatten(batch(None)).to_arrays()
    del arrays["routed_tokens"], arrays["routed_experts"]
    assert FlatBatch.from_arrays(arrays).routed_tokens.tolist() == [0]


@pytest.mark.parametrize(
    ("routed", "said"),
    [
        ([np.zeros((6, 3, 2), np.uint8)], "sample 0 of step 1 has the experts of 6 tokens, and 5 tokens"),
        ([np.zeros((4, 3, 2), np.uint8), np.zeros((4, 2, 2), np.uint8)], "sample 1 of step 1 .*2 layers x 2"),
    ],
)
def test_experts_that_do_not_fit_their_batch_are_refused(routed, said):
    with pytest.raises(ValueError, match=said):
        flatten(batch(*routed))


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_the_in_process_engine_tells_where_its_tokens_went(tmp_path, family):
    model = save_tiny_model(tmp_path, family, scale=0.18)
    torch.set_num_threads(1)
    engine = InProcessEngine(tmp_path, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=8)
    shape = RoutingShape(4, 2, 8)
    prompts = [[5, 9, 200], [7], [3, 3, 40, 41, 42, 43, 44, 45], [100, 101]]
    stops = tuple(range(1, 250, 10))
    sampling = SamplingParams(3, 12, stops, seed=3, score_token_id=249, routing=shape)
    plain = replace(sampling, score_token_id=None)
    hooks = lambda: sum(len(layer.mlp.gate._forward_hooks) for layer in engine._model.model.layers)  # noqa: E731
    seen = set()
    for params in (sampling, plain):
        for prompt, group in zip(prompts, engine.generate(prompts, params, deadline=60)):
            for generation in group:
                ids = [*prompt, *generation.response_ids.tolist()]
                routed = generation.routed_experts
                # With a score the stop token is fed, too.
                scored = params.score_token_id is not None and generation.finish_reason == "stop"
                assert routed.shape == (len(ids) - (not scored), 4, 2) and routed.dtype == np.uint8
                seen.add((generation.finish_reason, scored))
                expected = chosen_experts(model, ids)[: len(routed)].sort(-1).values
                assert torch.equal(torch.from_numpy(routed).long().sort(-1).values, expected)
    assert seen == {("stop", True), ("stop", False), ("length", False)}
    assert hooks() == 0


def test_the_in_process_engine_takes_the_weights_of_experts_one_by_one(tmp_path):
    save_tiny_model(tmp_path, "mixtral")
    engine = InProcessEngine(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    other = tiny_model("mixtral", seed=5)
    engine.update_weights([(name, t.detach()) for name, t in disk_tensors(other).items()], version=4)
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(engine._model.parameters(), other.parameters())
    )
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert torch.equal(engine.named_parameters()[name], disk_tensors(other)[name])
    missing = {n: t.detach() for n, t in disk_tensors(other).items() if n != name}
    with pytest.raises(KeyError, match=r"experts\.3\.w2"):
        engine.update_weights(missing.items(), version=5)
    assert math.isfinite(engine.score([[5, 6, 7]], 249, deadline=10.0)[0])
