"""A real SGLang server of a model with experts: weights after each kind of sync, checksums, and where tokens went."""

import re
import sys

import numpy as np
import pytest
from helpers.models import chosen_experts, disk_tensors
from helpers.sglang_server import shared_server
from helpers.source_tree import ROOT

sys.path.insert(0, str(ROOT / "tests" / "servers"))
from test_weight_sync import EOS, SCORE, VOCABULARY, changed_model, logprobs, transport

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.rollout.engine import StopEarly
from megatron_laser.types import RoutingShape, SamplingParams
from megatron_laser.weight_sync import disk, sync_weights
from megatron_laser.weight_sync.server_memory import ALL_TAGS, WEIGHTS, ServerMemory

pytestmark = pytest.mark.sglang

LAYERS, EXPERTS, TOPK = 2, 8, 2


@pytest.fixture(scope="module", params=["qwen3-moe", pytest.param("mixtral", marks=pytest.mark.long)])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with shared_server(folder, "moe.routing_replay=true", family=request.param) as server:
        yield server


def open_engine(server, moved):
    endpoint = ServerEndpoint(server.url)
    expected = Expected(VOCABULARY, None, "float32", routing=True)
    return SglangEngine(lambda: [endpoint], api_key=server.api_key, expected=expected, transport=moved)


def stream(model, ranks=2):
    """The weights, in an order in which no expert follows the one before it: an export's by expert-parallel ranks."""
    weights = disk_tensors(model)

    def place(name):
        match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(.*)", name)
        return match and (match[1], int(match[2]) % (EXPERTS // ranks), int(match[2]))

    experts = sorted((name for name in weights if place(name)), key=place)
    rest = [name for name in weights if not place(name)]
    return [(name, weights[name].detach()) for name in [*rest[:-1], *experts, rest[-1]]]


@pytest.mark.parametrize("kind", ["disk", "tensor", "flattened", "colocated"])
def test_log_probs_and_checksums_are_the_trainers_after_a_sync(kind, server, process_group, tmp_path):
    engine = open_engine(server, transport(kind, server, tmp_path))
    memory = ServerMemory(engine, seconds=60.0)
    away = ALL_TAGS if kind == "colocated" else frozenset()
    try:
        for version in (0, 1):
            model = changed_model(server, 10 + version)
            memory.release(away)
            memory.resume({WEIGHTS})
            assert sync_weights(stream(model), engine, version) is None  # always verified
            assert memory.resume(ALL_TAGS) == ""
            prompts = [[4, 5, 6], [7, 8, 9]]
            sampling = SamplingParams(4, 12, (EOS,), score_token_id=SCORE)
            for prompt, group in zip(prompts, engine.generate(prompts, sampling, deadline=60)):
                for generation in group:
                    rows = logprobs(model, prompt + generation.response_ids.tolist())
                    ours = [
                        float(rows[len(prompt) - 1 + t, token])
                        for t, token in enumerate(generation.response_ids.tolist())
                    ]
                    assert generation.weight_version == version
                    assert generation.logprobs.tolist() == pytest.approx(ours, abs=1e-4)
    finally:
        engine.close()


def test_one_stale_expert_is_found_by_checksum(server, process_group, tmp_path):
    engine = open_engine(server, transport("disk", server, tmp_path))
    try:
        model = changed_model(server, 20)
        names = [name for name, _ in stream(model) if ".experts.5." in name]
        before = disk.write_hf_folder

        def without_one(weights, target, **settings):
            sent = [(name, tensor * 2 if name == names[-1] else tensor) for name, tensor in weights]
            return before(sent, target, **settings)

        disk.write_hf_folder = without_one
        try:
            trouble = sync_weights(stream(model), engine, 0)
        finally:
            disk.write_hf_folder = before
        assert trouble is not None and re.search(r"experts\.(w2|w13)_weight: \w{16} instead of", trouble)
        assert len(re.findall("instead of", trouble)) == 1
    finally:
        engine.close()


def test_the_server_tells_where_it_sent_each_token_and_that_is_where_the_model_sends_it(
    server, process_group, tmp_path
):
    engine = open_engine(server, transport("flattened", server, tmp_path))
    try:
        model = changed_model(server, 30)
        assert sync_weights(stream(model), engine, 0) is None
        prompts = [[4, 5, 6], [7, 8, 9, 10], [4, 5, 6, 7, 8]]  # the last begins as the first: from the cache
        shape = RoutingShape(LAYERS, TOPK, EXPERTS)
        sampling = SamplingParams(4, 12, (EOS,), score_token_id=SCORE, routing=shape)
        compared = 0
        for prompt, group in zip(prompts, engine.generate(prompts, sampling, deadline=60)):
            for generation in group:
                ids = prompt + generation.response_ids.tolist()
                routed = generation.routed_experts
                assert routed.dtype == np.uint8 and len(routed) in (len(ids) - 1, len(ids))
                own = chosen_experts(model, ids)[: len(routed)].numpy()
                assert (np.sort(routed, axis=2) == np.sort(own, axis=2)).all()
                compared += len(routed)
        assert compared > 60
    finally:
        engine.close()


def test_a_response_in_several_pieces_has_the_experts_of_all_its_tokens(server, process_group, tmp_path):
    """What an aborted answer told, and then the rest: one row for each token, and each where the model sends it."""
    engine = open_engine(server, transport("flattened", server, tmp_path))
    try:
        model = changed_model(server, 31)
        assert sync_weights(stream(model), engine, 0) is None
        prompts = [[4, 5, 6 + i] for i in range(4)]
        sampling = SamplingParams(8, 50, (EOS,), routing=RoutingShape(LAYERS, TOPK, EXPERTS))
        stop, finished = StopEarly(), []

        def on_finished(prompt, sample, generation):
            finished.append((prompt, sample))
            if len(finished) == 4:
                stop.set()

        some = engine.generate_some(prompts, sampling, deadline=120, on_finished=on_finished, stop=stop)
        had = {(p, s): g for p, group in enumerate(some) for s, g in enumerate(group) if g is not None}
        begun = [place for place, g in had.items() if g.finish_reason == "abort" and len(g.response_ids)]
        told = [(p, s) for p, s in begun if had[p, s].routed_experts is not None]
        print(f"{len(begun)} responses were begun, of {len(told)} the aborted answer told the experts")
        assert begun and told == begun
        for p, s in begun:
            assert len(had[p, s].routed_experts) == len(prompts[p]) + len(had[p, s].response_ids) - 1
        again = engine.generate_some(prompts, sampling, deadline=120, resume=had)
        for prompt, group in zip(prompts, again):
            for generation in group:
                ids = prompt + generation.response_ids.tolist()
                routed = generation.routed_experts
                assert len(routed) == len(ids) - 1
                own = chosen_experts(model, ids)[: len(routed)].numpy()
                assert (np.sort(routed, axis=2) == np.sort(own, axis=2)).all()
    finally:
        engine.close()
