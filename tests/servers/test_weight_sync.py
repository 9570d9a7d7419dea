"""Weights on a real SGLang server are the trainer's after each kind of sync, and stale ones are found out."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.errors import WeightsNeeded
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.rollout.engine import StopEarly
from megatron_laser.types import SamplingParams
from megatron_laser.weight_sync import disk, sync_weights
from megatron_laser.weight_sync.colocated import ColocatedTransport
from megatron_laser.weight_sync.disk import DiskTransport
from megatron_laser.weight_sync.distributed import DistributedTransport
from megatron_laser.weight_sync.peers import Peers
from megatron_laser.weight_sync.server_memory import ALL_TAGS, WEIGHTS, ServerMemory

pytestmark = pytest.mark.sglang

VOCABULARY, EOS, SCORE = 28, 1, 2


def transport(kind, server, folder):
    common = dict(dtype=torch.float32, seconds=60.0, always_verify=True)
    if kind == "colocated":
        return ColocatedTransport(bucket_bytes=20_000, **common)
    if kind == "disk":
        return DiskTransport(folder, source=server.model, **common)
    return DistributedTransport(
        peers=Peers(torch_version=torch.__version__, nccl_version=None),
        bucket_bytes=20_000,
        address=None,
        flattened=kind == "flattened",
        **common,
    )


def open_engine(server, moved=None):
    endpoint = ServerEndpoint(server.url)
    return SglangEngine(
        lambda: [endpoint],
        api_key=server.api_key,
        expected=Expected(VOCABULARY, "qwen2", "float32"),
        transport=moved,
    )


def changed_model(server, seed):
    model = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def stream(model):
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def logprobs(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)


@pytest.mark.parametrize("kind", ["disk", "tensor", "flattened", "colocated"])
def test_log_probs_and_scores_are_the_trainers_after_a_sync(kind, sglang_server, process_group, tmp_path):
    engine = open_engine(sglang_server, transport(kind, sglang_server, tmp_path))
    memory = ServerMemory(engine, seconds=60.0)
    away = ALL_TAGS if kind == "colocated" else frozenset()
    try:
        for version in (0, 1):
            model = changed_model(sglang_server, 10 + version)
            memory.release(away)
            memory.resume({WEIGHTS})
            assert sync_weights(stream(model), engine, version) is None
            assert memory.resume(ALL_TAGS) == ""
            prompts = [[4, 5, 6], [7, 8, 9]]
            sampling = SamplingParams(4, 12, (EOS,), score_token_id=SCORE)
            for prompt, group in zip(prompts, engine.generate(prompts, sampling, deadline=60)):
                for generation in group:
                    assert generation.weight_version == version
                    rows = logprobs(model, prompt + generation.response_ids.tolist())
                    ours = [
                        float(rows[len(prompt) - 1 + t, token])
                        for t, token in enumerate(generation.response_ids.tolist())
                    ]
                    assert generation.logprobs.tolist() == pytest.approx(ours, abs=1e-4)
                    if generation.zc_logprob is not None:
                        assert generation.zc_logprob == pytest.approx(float(rows[-1, SCORE]), abs=1e-4)
            sequence = [4, 5, 6, 7, EOS]
            last = logprobs(model, sequence)[-1]
            assert engine.score([sequence], SCORE, deadline=30) == pytest.approx(
                [float(last[SCORE])], abs=1e-4
            )
            tokens = [SCORE, 9, EOS]  # in one request
            (several,) = engine.score_tokens([sequence], tokens, deadline=30)
            assert several == pytest.approx([float(last[token]) for token in tokens], abs=1e-4)
    finally:
        engine.close()


def test_a_server_with_other_weights_under_the_right_name_is_found_by_checksum(
    sglang_server, process_group, tmp_path
):
    engine = open_engine(sglang_server, transport("disk", sglang_server, tmp_path))
    try:
        sent = stream(changed_model(sglang_server, 20))
        assert sync_weights(sent, engine, 0) is None
        before = disk.from_disk_body
        disk.from_disk_body = lambda folder, label: before(str(sglang_server.model), label)
        try:
            trouble = sync_weights(stream(changed_model(sglang_server, 21)), engine, 1)
        finally:
            disk.from_disk_body = before
        assert trouble is not None and "its weights are not the trainer's" in trouble
        assert engine.version == 0
        engine.run(engine.fleet.wait_until_up(1, 30.0), 30.0, "waiting")
        assert sync_weights(stream(changed_model(sglang_server, 21)), engine, 1) is None
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["disk", "flattened"])
def test_a_server_whose_weights_somebody_else_changed_is_found_by_version(
    kind, sglang_server, process_group, tmp_path
):
    engine = open_engine(sglang_server, transport(kind, sglang_server, tmp_path))
    try:
        model = changed_model(sglang_server, 30)
        assert sync_weights(stream(model), engine, 0) is None
        sglang_server.call("/update_weight_version", {"new_version": "another", "abort_all_requests": False})
        sequence = [4, 5, EOS]
        expected = float(logprobs(model, sequence)[-1, SCORE])
        if kind == "disk":  # the folder is still there: the server is given it again, and then answers
            assert engine.score([sequence], SCORE, deadline=30) == pytest.approx([expected], abs=1e-4)
            assert sglang_server.call("/model_info")["weight_version"] == engine.label(0)
        else:  # only a sync of all ranks can mend it
            with pytest.raises(WeightsNeeded, match="holds weights 'another' instead of"):
                engine.score([sequence], SCORE, deadline=30)
            assert sync_weights(stream(model), engine, 0) is None
            assert engine.score([sequence], SCORE, deadline=30) == pytest.approx([expected], abs=1e-4)
    finally:
        engine.close()


def test_all_but_one_token_of_a_score_come_from_the_cache(sglang_server):
    engine = open_engine(sglang_server)
    try:
        sampling = SamplingParams(8, 40, (EOS,), score_token_id=SCORE)
        engine.take_metrics()
        groups = engine.generate([[4, 5, 6 + i] for i in range(4)], sampling, deadline=120)
        scored = [g for group in groups for g in group if g.zc_logprob is not None]
        metrics = engine.take_metrics()
        assert scored and all(g.response_ids[-1] == EOS for g in scored)
        assert metrics["rollout/score_uncached_tokens"] == pytest.approx(1.0, abs=0.5)
        assert 0 < metrics["rollout/score_time_fraction"] < 0.5
    finally:
        engine.close()


def test_what_is_stopped_early_goes_on_where_it_was(sglang_server):
    engine = open_engine(sglang_server)
    try:
        stop, finished = StopEarly(), []

        def on_finished(prompt, sample, generation):
            finished.append((prompt, sample))
            if len(finished) == 4:
                stop.set()

        prompts = [[4, 5, 6 + i] for i in range(4)]
        sampling = SamplingParams(8, 50, (EOS,))
        some = engine.generate_some(prompts, sampling, deadline=120, on_finished=on_finished, stop=stop)
        had = {(p, s): g for p, group in enumerate(some) for s, g in enumerate(group) if g is not None}
        again = engine.generate_some(prompts, sampling, deadline=120, resume=had)
        for (p, s), before in had.items():
            after = again[p][s]
            assert after.response_ids[: len(before.response_ids)].tolist() == before.response_ids.tolist()
            assert len(after.response_ids) == len(after.logprobs) <= 50
        assert all(g.finish_reason in ("stop", "length") for group in again for g in group)
    finally:
        engine.close()


def test_an_id_outside_the_vocabulary_is_refused_before_it_can_kill_the_server(sglang_server):
    engine = open_engine(sglang_server)
    try:
        with pytest.raises(ValueError, match="token id 28; expected 0 to 27"):
            engine.score([[4, 28]], SCORE, deadline=5)
    finally:
        engine.close()
