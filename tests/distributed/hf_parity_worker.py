"""Two ranks: families under layouts against transformers. Started by test_hf_parity.py.

hf_parity_worker.py MODELS CASES.json OUTPUT.json

A case is [family, layout]. Rank 0 writes one JSON object: "family, layout" -> figures, the worst over both ranks. What
they must be is said in the test.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.models import FAMILIES
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from helpers.torchrun import run_worker
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM

from megatron_laser.batching.context import context_positions, packed_order
from megatron_laser.config import ModelFolderError
from megatron_laser.distributed import runtime as runtimes
from megatron_laser.model.hf_config import read_hf_config
from megatron_laser.model.hf_folder import HfFolder, write_hf_folder
from megatron_laser.model.weights import WeightExporter
from megatron_laser.trainer.forward_backward import run_forward
from megatron_laser.trainer.policy import build_chunks
from megatron_laser.trainer.step_data import make_micro_batch

# Shards of 16 rows: 250 + 6 padded rows at one or two ranks. 256 rows at two ranks: rank 1 has nothing but padding.
LAYOUTS = {
    "data 2": [],
    "tensor 2": ["parallel.tensor=2"],
    "tensor 2, shard of padding": ["parallel.tensor=2", "model.vocab_multiple=256"],
    "tensor 2, sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline 2": ["parallel.pipeline=2"],
    "context 2": ["parallel.context=2"],
    "expert 2": ["parallel.expert=2"],
    "expert 2 within tensor 2": ["parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"],
    "expert tensor 2": ["parallel.expert_tensor=2", "parallel.tensor=2", "parallel.sequence=true"],
}
GROUPS = [[Response(17, True), Response(1, False), Response(40, False, truncated=True)], [Response(6, True)]]


class RecordingFolder(HfFolder):
    """Counts the elements that are asked for; `whole` are the names that were read in full."""

    def __init__(self, path):
        super().__init__(path)
        self.elements = 0
        self.whole = []

    def _count(self, tensor):
        self.elements += tensor.numel()
        return tensor

    def rows(self, name, start, stop):
        return self._count(super().rows(name, start, stop))

    def columns(self, name, start, stop):
        return self._count(super().columns(name, start, stop))

    def full(self, name):
        self.whole.append(name)
        return self._count(super().full(name))


def reference_logits(model, flat):
    """One separate transformers forward per sample: list of [length, vocab]."""
    return [
        model(torch.from_numpy(flat.tokens[a:b].astype("int64"))[None]).logits[0]
        for a, b in zip(flat.token_offsets, flat.token_offsets[1:])
    ]


def gathered(local, group, dim):
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def logits_difference(chunks, micro_batches, samples, expected, vocab):
    """Largest |difference| of the ordinary (vocabulary-parallel) logits, on the last stage."""
    worst = 0.0
    context = parallel_state.get_context_parallel_group()
    outputs = run_forward(chunks, micro_batches, head=lambda micro_batch: None)
    for local, micro_batch, members in zip(outputs, micro_batches, samples):
        logits = gathered(local, parallel_state.get_tensor_model_parallel_group(), -1)[0, :, :vocab]
        starts = micro_batch.packed.cu_seqlens_q.numpy()
        logits = gathered(logits, context, 0)[torch.from_numpy(packed_order(starts, size=context.size()))]
        for start, sample in zip(starts, members):
            wanted = expected[sample]
            worst = max(worst, (logits[start : start + len(wanted)] - wanted).abs().max().item())
    return worst


def logprob_difference(chunks, micro_batches, samples, expected, flat, temperature):
    """Largest |difference| of the head's log-probs and entropies, score rows included."""
    worst = 0.0
    outputs = run_forward(chunks, micro_batches)
    few = run_forward(chunks, micro_batches, lambda micro_batch: micro_batch.only_scores())
    for output, scores, micro_batch, members in zip(outputs, few, micro_batches, samples):
        wanted = []
        for sample in members:
            prompt, response = int(flat.prompt_lengths[sample]), flat.response_ids(sample)
            policy = (expected[sample] / temperature).log_softmax(-1)
            for t, token in enumerate(response):
                row = policy[prompt - 1 + t]
                wanted.append((row[int(token)], -(row.exp() * row).sum()))
            if flat.scored[sample]:
                row = expected[sample][-1].log_softmax(-1)
                wanted.append((row[SCORE_TOKEN], -(row.exp() * row).sum()))
        wanted = torch.tensor(wanted).T[:, own_rows(flat, members, micro_batch)]
        worst = max(worst, (output - wanted).abs().max().item())
        difference = scores[0] - wanted[0][micro_batch.score_rows]
        worst = max(worst, difference.abs().max().item() if difference.numel() else 0.0)
    return worst


def own_rows(flat, members, micro_batch):
    """Which of the micro-batch's labelled rows this context rank has: they are in its chunks of their sequences."""
    group = parallel_state.get_context_parallel_group()
    starts = micro_batch.packed.cu_seqlens_q.numpy()
    own = set(context_positions(starts, size=group.size(), rank=group.rank()).tolist())
    rows = []
    for start, sample in zip(starts.tolist(), members):
        first = start + int(flat.prompt_lengths[sample]) - 1
        count = int(flat.response_lengths[sample]) + int(flat.scored[sample])
        rows += [row in own for row in range(first, first + count)]
    return torch.tensor(rows)


def worst_over_ranks(value):
    box = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.item()


def check(config, source, reference, export_to):
    flat = rollout_batch(GROUPS)
    samples = [[2, 0], [1, 3]]  # two micro-batches; lengths mixed inside each
    tensor = config.parallel.tensor
    hf = read_hf_config(source)
    with RecordingFolder(source) as folder:
        chunks = build_chunks(config, hf, folder)
        micro_batches = [
            make_micro_batch(
                flat,
                members,
                score_token_id=SCORE_TOKEN,
                temperature=0.7,
                pad_multiple=8 * tensor,
                context_size=config.parallel.context,
                context_rank=parallel_state.get_context_parallel_rank(),
            )
            for members in samples
        ]
        with torch.no_grad():
            expected = reference_logits(reference, flat)
            logits = logits_difference(chunks, micro_batches, samples, expected, hf.vocab_size)
            logprobs = logprob_difference(chunks, micro_batches, samples, expected, flat, 0.7)
        held = 0
        for model in chunks.models:
            for name, parameter in model.named_parameters():
                rows = parameter.shape[0]
                if "embedding" in name or "output_layer" in name:
                    rank = parallel_state.get_tensor_model_parallel_rank()
                    rows = min(rows, max(0, hf.vocab_size - rank * rows))
                held += rows * parameter[0].numel()
        read_too_much = folder.elements - held
        routers = ("mlp.gate.weight", "block_sparse_moe.gate.weight")  # on every rank
        matrices = [name for name in folder.whole if not name.endswith(routers)]
        wholly_read_matrices = sum(len(folder.shape(name)) > 1 for name in matrices)
        stream = WeightExporter(chunks.models, hf, chunks.geometry).stream()
        if dist.get_rank() == 0:
            write_hf_folder(stream, export_to, source=source, dtype=torch.float32, max_shard_bytes=40_000)
            export = compare_export(folder, export_to, reference, flat)
        else:
            export = {"streamed_elsewhere": len(list(stream))}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, export)
    return {
        "logits": worst_over_ranks(logits),
        "logprobs": worst_over_ranks(logprobs),
        "read_too_much": worst_over_ranks(abs(read_too_much)),
        "wholly_read_matrices": worst_over_ranks(wholly_read_matrices),
    } | {name: value for part in everywhere for name, value in part.items()}


def compare_export(folder, export_to, reference, flat):
    with HfFolder(export_to) as exported:
        names = sorted(exported.names())
        changed = [name for name in names if not torch.equal(exported.full(name), folder.full(name))]
        shards = len(list(export_to.glob("model-*.safetensors")))
    loaded = AutoModelForCausalLM.from_pretrained(export_to, local_files_only=True).eval()
    with torch.no_grad():
        pairs = zip(reference_logits(loaded, flat), reference_logits(reference, flat))
        equal = all(torch.equal(mine, theirs) for mine, theirs in pairs)
    return {"names": names, "changed": changed, "shards": shards, "transformers_logits_equal": equal}


def refusals(config, source, copy):
    """What each rank says of weights with NaN in what the last rank alone reads."""
    hf = read_hf_config(source)
    # The last columns of an expert's matrix, which the second rank alone has.
    name = f"model.layers.{hf.num_hidden_layers - 1}.block_sparse_moe.experts.7.w2.weight"

    def spoilt(folder):
        for one in folder.names():
            tensor = folder.full(one).clone()
            if one == name:
                tensor[-1, -1] = math.nan
            yield one, tensor

    if dist.get_rank() == 0:
        with HfFolder(source) as folder:
            write_hf_folder(spoilt(folder), copy, source=source, dtype=torch.float32)
    dist.barrier()
    said = ""
    with HfFolder(copy) as folder:
        try:
            build_chunks(config, hf, folder)
        except ModelFolderError as error:
            said = str(error)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    return everywhere


def main():
    models, output = Path(sys.argv[1]), Path(sys.argv[3])
    cases = json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    runtime, results = None, {}
    for layout, overrides in LAYOUTS.items():
        families = [family for family in FAMILIES if [family, layout] in cases]
        for family in families:
            source = models / family
            config = run_config(models / f"rank-{os.environ['RANK']}", source, *overrides)
            if runtime is None:
                runtime = runtimes.start(config)
            elif family == families[0]:
                parallel_state.destroy_model_parallel()
                runtimes.build_groups(config, runtime.store)
            reference = AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval()
            results[f"{family}, {layout}"] = check(config, source, reference, models / "exported")
            dist.barrier()
    assert all(math.isfinite(result["logits"]) for result in results.values())
    assert source.name == "mixtral" and layout == "expert tensor 2", "the last case is that of the refusals"
    everywhere = refusals(config, source, models / "spoilt")
    if runtime.is_main:
        output.write_text(json.dumps(results))
        (models / "refusals.json").write_text(json.dumps(everywhere))
    runtimes.stop()


if __name__ == "__main__":
    run_worker(main)
