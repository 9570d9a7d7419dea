"""The weight stream in buckets of bounded size, and the checksums that servers are compared by."""

import gc
import hashlib
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laser.weight_sync.buckets import buckets
from megatron_laser.weight_sync.checksums import StreamDigest, differences, server_name
from megatron_laser.weight_sync.distributed import DistributedTransport

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def stream(sizes):
    """(name, [n] tensor) of each (number of elements, index of its dtype)."""
    return [(f"t{index}", torch.arange(count).to(DTYPES[kind])) for index, (count, kind) in enumerate(sizes)]


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=12),
    limit=st.integers(1, 200),
)
def test_buckets_keep_order_bounds_and_dtypes_and_only_the_final_one_is_last(sizes, limit):
    sent = stream(sizes)
    found = list(buckets(iter(sent), limit))
    assert [name for bucket in found for name, _ in bucket.tensors] == [name for name, _ in sent]
    assert [bucket.last for bucket in found] == [False] * (len(found) - 1) + [True] * bool(found)
    for bucket in found:
        assert bucket.tensors and (bucket.nbytes <= limit or len(bucket.tensors) == 1)
        assert len({tensor.dtype for _, tensor in bucket.tensors}) == 1
    # none could have taken the first tensor of the next one
    for bucket, after in pairwise(found):
        first = after.tensors[0][1]
        full = bucket.nbytes + first.nbytes > limit
        assert full or first.dtype != bucket.tensors[0][1].dtype


@settings(deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=12))
def test_a_flat_bucket_is_its_tensors_bytes_one_after_the_other(sizes):
    for bucket in buckets(iter(stream(sizes)), 64):
        flat = bucket.flat()
        assert flat.dtype == torch.uint8 and flat.shape == (bucket.nbytes,)
        plain = b"".join(bytes(tensor.view(torch.uint8).tolist()) for _, tensor in bucket.tensors)
        assert bytes(flat.tolist()) == plain


def test_what_a_server_is_told_of_a_bucket_describes_it():
    (bucket,) = buckets([("a", torch.zeros(2, 3)), ("b", torch.zeros(4))], 1000, dtype=torch.bfloat16)
    assert bucket.describe() == {
        "names": ["a", "b"],
        "dtypes": ["bfloat16", "bfloat16"],
        "shapes": [[2, 3], [4]],
    }
    assert bucket.nbytes == 20


def test_a_bucket_is_a_copy_so_that_training_may_go_on():
    weight = torch.ones(3)
    (bucket,) = buckets([("a", weight)], 100, dtype=torch.float32)
    weight.add_(1)
    assert bucket.tensors[0][1].tolist() == [1.0, 1.0, 1.0]
    transposed = torch.arange(6.0).reshape(2, 3).T
    (bucket,) = buckets([("a", transposed)], 100)
    assert bucket.tensors[0][1].is_contiguous()
    assert bucket.flat().view(torch.float32).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


def test_one_tensor_is_gathered_beyond_a_bucket_and_no_bucket_is_held_back():
    gathered, alive = [], []

    def gathering():
        for index in range(9):
            gathered.append(index)
            yield f"t{index}", torch.ones(10)

    seen = 0
    for bucket in buckets(gathering(), 3 * 40):
        seen += len(bucket.tensors)
        assert len(gathered) <= seen + 1
        # of what was yielded before, nothing is left
        gc.collect()
        assert all(reference() is None for reference in alive)
        alive += [weakref.ref(tensor) for _, tensor in bucket.tensors]
        del bucket
    assert seen == 9 and len(alive) == 9


def test_the_next_bucket_is_gathered_while_one_is_on_its_way_and_two_are_in_memory():
    log, buckets_made, flats_made = [], [], []

    def gone(references):
        gc.collect()
        return all(reference() is None for reference in references)

    class Recording(DistributedTransport):
        def __init__(self):
            self._bucket_bytes, self._dtype = 2 * 40, torch.float32

        def _start(self, update, group, bucket):
            assert gone(flats_made)  # what has landed, before the next one is made flat
            buckets_made.extend(weakref.ref(tensor) for _, tensor in bucket.tensors)
            flat = bucket.flat()
            flats_made.append(weakref.ref(flat))
            names = "+".join(name for name, _ in bucket.tensors)
            log.append(f"start {names}")
            return names, flat

        def _land(self, update, flight):
            log.append(f"land {flight[0]}")

    def gathering():
        for index in range(7):
            log.append(f"gather {index}")
            yield f"t{index}", torch.ones(10)
            if log[-1].startswith("gather"):  # nothing has been started since, so a bucket grows
                assert gone(buckets_made)  # beside the flat one that is on its way

    Recording()._stream(None, None, gathering())
    assert log == [
        *("gather 0", "gather 1", "gather 2", "start t0+t1"),
        *("gather 3", "gather 4", "land t0+t1", "start t2+t3"),
        *("gather 5", "gather 6", "land t2+t3", "start t4+t5"),
        *("land t4+t5", "start t6", "land t6"),
    ]
    assert len(buckets_made) == 7


# checksums


def sha(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).digest()[:8].hex()


def rows(count, width, start):
    return (np.arange(count * width, dtype=np.float32) + start).reshape(count, width)


def test_sums_are_those_of_the_servers_fused_and_padded_parameters():
    layer = "model.layers.0."
    arrays = {
        "model.embed_tokens.weight": rows(28, 4, 0),
        f"{layer}self_attn.q_proj.weight": rows(4, 4, 1),
        f"{layer}self_attn.k_proj.weight": rows(2, 4, 2),
        f"{layer}self_attn.v_proj.weight": rows(2, 4, 3),
        f"{layer}self_attn.q_proj.bias": rows(1, 4, 4)[0],
        f"{layer}self_attn.k_proj.bias": rows(1, 2, 5)[0],
        f"{layer}self_attn.v_proj.bias": rows(1, 2, 6)[0],
        f"{layer}self_attn.o_proj.weight": rows(4, 4, 7),
        f"{layer}mlp.gate_proj.weight": rows(6, 4, 8),
        f"{layer}mlp.up_proj.weight": rows(6, 4, 9),
        f"{layer}mlp.down_proj.weight": rows(4, 6, 10),
        "model.norm.weight": rows(1, 4, 11)[0],
        "lm_head.weight": rows(64, 4, 12),
    }
    digest = StreamDigest(dtype=torch.float32, hashed=True)
    list(digest.watch((name, torch.from_numpy(array)) for name, array in arrays.items()))
    values = list(arrays.values())
    assert digest.sums() == {
        "model.embed_tokens.weight": sha(values[0], np.zeros((36, 4), np.float32)),
        f"{layer}self_attn.qkv_proj.weight": sha(*values[1:4]),
        f"{layer}self_attn.qkv_proj.bias": sha(*values[4:7]),
        f"{layer}self_attn.o_proj.weight": sha(values[7]),
        f"{layer}mlp.gate_up_proj.weight": sha(*values[8:10]),
        f"{layer}mlp.down_proj.weight": sha(values[10]),
        "model.norm.weight": sha(values[11]),
        "lm_head.weight": sha(values[12]),  # 64 rows need no padding
    }


def test_sums_are_of_what_is_sent_not_of_what_is_trained():
    digest = StreamDigest(dtype=torch.bfloat16, hashed=True)
    weight = torch.tensor([1.0, 1.0 + 2**-12])
    ((_, passed),) = digest.watch([("w", weight)])
    assert passed is weight
    ones = np.array([0x3F80, 0x3F80], dtype=np.uint16)  # both round to 1.0
    assert digest.sums() == {"w": sha(ones)}


def test_names_that_are_not_fused_stay_as_they_are():
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight", "x.q_proj"):
        assert server_name(name) == name
    assert server_name("model.layers.11.mlp.up_proj.weight") == "model.layers.11.mlp.gate_up_proj.weight"


def report(*ranks):
    return {"ranks": [{"checksums": sums, "per_gpu_checksum": "x"} for sums in ranks]}


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"a": "1", "b": "2", "rope": "3"}, []),
        ({"a": "1", "b": "9"}, ["b: 9 instead of 2"]),
        ({"a": "1"}, ["b: the server has no such parameter"]),
    ],
)
def test_differences_name_the_parameter(theirs, expected):
    assert differences({"a": "1", "b": "2"}, report(theirs)) == expected


def test_a_tied_output_layer_and_shards_of_tensor_parallel_ranks_are_no_difference():
    sums = {"model.embed_tokens.weight": "1", "lm_head.weight": "1"}
    assert differences(sums, report({"model.embed_tokens.weight": "1"})) == []
    assert differences({"lm_head.weight": "1"}, report({"other": "1"})) != []
    assert differences({"a": "1"}, report({"a": "5"}, {"a": "6"})) == []
