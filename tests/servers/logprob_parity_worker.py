"""Two trainer ranks and a real server: after each kind of sync both give the same log-probs (test_logprob_parity.py).

    logprob_parity_worker.py URL KEY MODELS OUTPUT

MODELS has one Hugging Face folder for each of the syncs. Rank 0 writes one JSON object: "layout, sync" -> figures.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.runs import run_config
from helpers.torchrun import run_worker
from megatron.core import parallel_state

from megatron_laser.batching.flat import FlatBatch, flatten
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.distributed.broadcast import broadcast_arrays
from megatron_laser.model.hf_config import read_hf_config
from megatron_laser.model.hf_folder import HfFolder
from megatron_laser.model.weights import WeightExporter
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.trainer.forward_backward import run_forward
from megatron_laser.trainer.policy import build_chunks
from megatron_laser.trainer.step_data import make_micro_batch
from megatron_laser.types import Group, Prompt, RolloutBatch, Sample, SamplingParams
from megatron_laser.weight_sync import sync_weights
from megatron_laser.weight_sync.disk import DiskTransport
from megatron_laser.weight_sync.distributed import DistributedTransport
from megatron_laser.weight_sync.peers import Peers

VOCABULARY, EOS, SCORE = 28, 1, 2
TEMPERATURE = 0.8  # responses are of logits / temperature, the score is not
PROMPTS = [[4, 5, 6], [7, 8, 9, 10, 11], [12], [6, 5]]
SAMPLING = SamplingParams(8, 48, (EOS,), temperature=TEMPERATURE, score_token_id=SCORE)
LAYOUTS = {"tensor 2": ["parallel.tensor=2"], "pipeline 2": ["parallel.pipeline=2"]}
# How weights travel does not depend on which ranks they come from: all ways once.
SYNCS = {"tensor 2": ("disk", "tensor by tensor", "flattened"), "pipeline 2": ("flattened",)}


def open_engine(url, key, sync, source, folder):
    common = dict(dtype=torch.float32, seconds=60.0, always_verify=True)
    if sync == "disk":
        transport = DiskTransport(folder, source=source, **common)
    else:
        transport = DistributedTransport(
            peers=Peers(torch_version=torch.__version__, nccl_version=None),
            bucket_bytes=20_000,
            address=None,
            flattened=sync == "flattened",
            **common,
        )
    expected = Expected(VOCABULARY, "qwen2", "float32")
    return SglangEngine(lambda: [ServerEndpoint(url)], api_key=key, expected=expected, transport=transport)


def rollout(engine):
    """Responses of the server as a batch, and its score of each: NaN where there is none."""
    batch = RolloutBatch(step=1, weight_version=engine.version)
    for row, (prompt, group) in enumerate(
        zip(PROMPTS, engine.generate(PROMPTS, SAMPLING, deadline=60), strict=True)
    ):
        samples = [
            Sample(prompt, one, "", one.is_scored(SAMPLING.stop_token_ids), 0.0, "wrong", one.zc_logprob)
            for one in group
        ]
        batch.groups.append(Group(Prompt(row, "", "", prompt), samples))
    scores = [float("nan") if one.zc_logprob is None else one.zc_logprob for one in batch.samples()]
    return batch, torch.tensor(scores)


def differences(chunks, flat, scores, pad_multiple):
    """On the last stage: the largest difference of response log-probs, of scores, and how many scores there were."""
    samples = [list(range(0, len(flat.scored), 2)), list(range(1, len(flat.scored), 2))]
    micro_batches = [
        make_micro_batch(
            flat, members, score_token_id=SCORE, temperature=TEMPERATURE, pad_multiple=pad_multiple
        )
        for members in samples
    ]
    responses = score = 0.0
    count = 0
    for output, micro_batch in zip(run_forward(chunks, micro_batches), micro_batches):
        ours = output[0]
        responses = max(
            responses, (ours[micro_batch.policy_rows] - micro_batch.rollout_logprobs).abs().max().item()
        )
        theirs = scores[micro_batch.score_sample]
        if len(theirs):
            score = max(score, (ours[micro_batch.score_rows] - theirs).abs().max().item())
        count += len(theirs)
    return torch.tensor([responses, score, float(count)])


def check(config, runtime, engine, version, source):
    hf = read_hf_config(source)
    with HfFolder(source) as folder:
        chunks = build_chunks(config, hf, folder)
    stream = WeightExporter(chunks.models, hf, chunks.geometry).stream()
    trouble = sync_weights(stream, engine, version)
    assert trouble is None, trouble
    arrays = scores = None
    if engine is not None:
        batch, scores = rollout(engine)
        arrays = flatten(batch).to_arrays() | {"server_scores": scores.numpy()}
    arrays = broadcast_arrays(arrays, runtime)
    scores = torch.from_numpy(arrays.pop("server_scores"))
    figures = differences(chunks, FlatBatch.from_arrays(arrays), scores, 8 * config.parallel.tensor)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return dict(zip(("responses", "scores", "scored"), figures.tolist()))


def main():
    url, key, models, output = sys.argv[1], sys.argv[2] or None, Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    runtime, results = None, {}
    sources = sorted(models.iterdir())
    for layout, overrides in LAYOUTS.items():
        config = run_config(
            output.parent / f"rank-{os.environ['RANK']}",
            sources[0],
            "model.vocab_multiple=1",
            f"laser.score_token={SCORE}",
            *overrides,
        )
        if runtime is None:
            runtime = runtimes.start(config)
        else:
            parallel_state.destroy_model_parallel()
            runtime = runtimes.build_groups(config, runtime.store)
        for sync in SYNCS[layout]:
            engine = None
            if runtime.is_main:
                engine = open_engine(url, key, sync, sources[0], output.parent / "weights")
            for version, source in enumerate(sources):
                results[f"{layout}, {sync}, {source.name}"] = check(config, runtime, engine, version, source)
            if engine is not None:
                engine.close()
            dist.barrier()
    if runtime.is_main:
        output.write_text(json.dumps(results))
    runtimes.stop()


if __name__ == "__main__":
    run_worker(main)
