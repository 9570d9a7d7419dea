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
from megatron_laser.weight_sync.checksums import ServerLayout, StreamDigest, differences, server_name
from megatron_laser.weight_sync.distributed import DistributedTransport
from megatron_laser.weight_sync.fp8 import as_served
from megatron_laser.weight_sync.hashes import TileSums

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture
def quick_collections():
    """What the tests before have left is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def stream(sizes):
    """(name, [n] tensor) of each (number of elements, index of its dtype)."""
    return [(f"t{index}", torch.arange(count).to(DTYPES[kind])) for index, (count, kind) in enumerate(sizes)]


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=12),
    limit=st.integers(1, 200),
)
def test_buckets_keep_order_and_bounds_and_only_the_final_one_is_last(sizes, limit):
    sent = stream(sizes)
    found = list(buckets(iter(sent), limit))
    place = {name: index for index, (name, _) in enumerate(sent)}
    order = [sorted(place[name] for name, _ in bucket.tensors) for bucket in found]
    assert [index for part in order for index in part] == list(range(len(sent)))
    assert [bucket.last for bucket in found] == [False] * (len(found) - 1) + [True] * bool(found)
    for bucket in found:
        assert bucket.tensors and (bucket.nbytes <= limit or len(bucket.tensors) == 1)
        sizes = [
            tensor.itemsize for _, tensor in bucket.tensors
        ]  # so that each begins at a multiple of its own
        assert sizes == sorted(sizes, reverse=True)
    # none could have taken the first tensor of the next one
    for bucket, after in pairwise(found):
        first = min(after.tensors, key=lambda item: place[item[0]])[1]
        assert bucket.nbytes + first.nbytes > limit


@settings(deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=12))
def test_a_flat_bucket_is_its_tensors_bytes_one_after_the_other(sizes):
    for bucket in buckets(iter(stream(sizes)), 64):
        flat = bucket.flat()
        assert flat.dtype == torch.uint8 and flat.shape == (bucket.nbytes,)
        plain = b"".join(bytes(tensor.view(torch.uint8).tolist()) for _, tensor in bucket.tensors)
        assert bytes(flat.tolist()) == plain


def test_what_a_server_is_told_of_a_bucket_describes_it():
    (bucket,) = buckets([("a", torch.zeros(2, 3).bfloat16()), ("b", torch.zeros(4).bfloat16())], 1000)
    assert bucket.describe() == {
        "names": ["a", "b"],
        "dtypes": ["bfloat16", "bfloat16"],
        "shapes": [[2, 3], [4]],
    }
    assert bucket.nbytes == 20


def test_a_bucket_is_a_copy_so_that_training_may_go_on():
    weight = torch.ones(3)
    (bucket,) = buckets([("a", weight)], 100)
    weight.add_(1)
    assert bucket.tensors[0][1].tolist() == [1.0, 1.0, 1.0]
    transposed = torch.arange(6.0).reshape(2, 3).T
    (bucket,) = buckets([("a", transposed)], 100)
    assert bucket.tensors[0][1].is_contiguous()
    assert bucket.flat().view(torch.float32).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


@pytest.mark.usefixtures("quick_collections")
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


@pytest.mark.usefixtures("quick_collections")
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

        def _wait_for(self, update, flight):
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
    digest = StreamDigest(on_cpu=True)
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
    digest = StreamDigest(on_cpu=True)
    weight = torch.tensor([1.0, 1.0 + 2**-12])
    list(digest.watch(as_served([("w", weight)], dtype=torch.bfloat16, quantized=False)))
    ones = np.array([0x3F80, 0x3F80], dtype=np.uint16)  # both round to 1.0
    assert digest.sums() == {"w": sha(ones)}


def tiles(*pieces):
    total = TileSums()
    for piece in pieces:
        total.add(piece)
    return total.hexdigest()


def plain_tiles(data):
    """The definition, word by word."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ x >> 16

    def turn(x, by):
        return (x << by | x >> 32 - by) & 0xFFFFFFFF

    words = np.frombuffer(data + bytes(-len(data) % 4), np.uint32).tolist()
    seeds = 0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF
    total = 0
    for first in range(0, len(words), 8192):
        h = [0, 0]
        for i, word in enumerate(words[first : first + 8192], first):
            h[0] += mix(word ^ (i * 0x27D4EB2D + seeds[0] & 0xFFFFFFFF) ^ turn(i, 15))
            h[1] += mix(word ^ (i * 0x165667B1 + seeds[1] & 0xFFFFFFFF) ^ turn(i, 13))
        high, low = (mix((part & 0xFFFFFFFF) ^ len(words) * 4) for part in h)
        total += high << 32 | low
    mask = (1 << 64) - 1
    total &= mask
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & mask
    total = (total ^ total >> 27) * 0x94D049BB133111EB & mask
    return f"{total ^ total >> 31:016x}"


@pytest.mark.parametrize("count", [1, 7, 4096, 16384, 16385, 40001])
@pytest.mark.parametrize("piece", [1237, 50000])
def test_the_sum_of_a_gpu_server_does_not_depend_on_the_pieces(count, piece):
    values = (torch.arange(count) * 40503).to(torch.int16).view(torch.bfloat16)
    expected = plain_tiles(values.view(torch.int16).numpy().tobytes())
    assert tiles(*values.split(piece)) == expected
    changed = values.clone().view(torch.int16)
    changed[-1] ^= 1
    assert tiles(changed) != expected


def test_the_sum_of_nothing_is_zero_and_places_count():
    assert tiles() == tiles(torch.zeros(0)) == "0" * 16
    assert tiles(torch.tensor([1.0, 2.0])) != tiles(torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(("size", "kv_rows"), [(2, 4), (4, 2)])
def test_each_tensor_parallel_rank_has_its_share(on_cpu, size, kv_rows):
    """8 query heads of 2 rows; 2 heads or 1 of keys and values, which several ranks of a larger server hold."""
    layer = "model.layers.3."
    stream = [
        ("model.embed_tokens.weight", torch.rand(100, 4)),
        (f"{layer}self_attn.q_proj.weight", torch.rand(16, 4)),
        (f"{layer}self_attn.k_proj.weight", torch.rand(kv_rows, 4)),
        (f"{layer}self_attn.v_proj.weight", torch.rand(kv_rows, 4)),
        (f"{layer}self_attn.q_norm.weight", torch.rand(2)),
        (f"{layer}self_attn.o_proj.weight", torch.rand(4, 16)),
        (f"{layer}mlp.gate_proj.weight", torch.rand(8, 4)),
        (f"{layer}mlp.up_proj.weight", torch.rand(8, 4)),
        (f"{layer}mlp.down_proj.weight", torch.rand(4, 8)),
    ]
    tensors = {name.removeprefix(layer).split(".")[-2]: tensor for name, tensor in stream}
    digest = StreamDigest(on_cpu=on_cpu, sizes={1, size}, layout=ServerLayout(heads=8))
    list(digest.watch(stream))

    def total(*parts):
        whole = torch.cat([part.contiguous().reshape(-1) for part in parts])
        return sha(whole.numpy()) if on_cpu else tiles(whole)

    def rows(name, rank, of=size):
        count = len(tensors[name]) // of
        return tensors[name][rank * count : (rank + 1) * count]

    padded = torch.cat([tensors["embed_tokens"], torch.zeros(28, 4)])
    for rank in range(size):
        kv = min(size, kv_rows // 2)
        kv_rank = rank * kv // size
        columns = slice(rank * 16 // size, (rank + 1) * 16 // size)
        half = slice(rank * 8 // size, (rank + 1) * 8 // size)
        assert digest.sums(size, rank) == {
            "model.embed_tokens.weight": total(padded.chunk(size)[rank]),
            f"{layer}self_attn.qkv_proj.weight": total(
                rows("q_proj", rank), rows("k_proj", kv_rank, kv), rows("v_proj", kv_rank, kv)
            ),
            f"{layer}self_attn.q_norm.weight": total(tensors["q_norm"]),
            f"{layer}self_attn.o_proj.weight": total(tensors["o_proj"][:, columns]),
            f"{layer}mlp.gate_up_proj.weight": total(rows("gate_proj", rank), rows("up_proj", rank)),
            f"{layer}mlp.down_proj.weight": total(tensors["down_proj"][:, half]),
        }
    assert set(digest.sums()) == set(digest.sums(size, 0))


def test_shares_that_are_not_known_are_not_compared():
    name = "model.layers.0.self_attn.{}_proj.weight"
    stream = [(name.format(part), torch.rand(4, 4)) for part in "qkvo"]
    digest = StreamDigest(on_cpu=True, sizes={2})
    list(digest.watch(stream))
    assert list(digest.sums(2, 1)) == [name.format("o")]


def test_names_that_are_not_fused_stay_as_they_are():
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight", "x.q_proj"):
        assert server_name(name) == name
    assert server_name("model.layers.11.mlp.up_proj.weight") == "model.layers.11.mlp.gate_up_proj.weight"


class Expected:
    """In the place of a `StreamDigest`."""

    def __init__(self, *ranks):
        self._ranks = ranks

    def sums(self, size, rank):
        return self._ranks[rank] if size == len(self._ranks) else {}


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
    assert differences(Expected({"a": "1", "b": "2"}), report(theirs)) == expected


def test_a_tied_output_layer_is_no_difference():
    sums = Expected({"model.embed_tokens.weight": "1", "lm_head.weight": "1"})
    assert differences(sums, report({"model.embed_tokens.weight": "1"})) == []
    assert differences(Expected({"lm_head.weight": "1"}), report({"other": "1"})) != []


def test_ranks_are_compared_by_their_number_whatever_their_order():
    ranks = Expected({"a": "5"}, {"a": "6"})
    found = report({"a": "6"}, {"a": "5"})
    assert differences(ranks, found) == ["rank 0, a: 6 instead of 5", "rank 1, a: 5 instead of 6"]
    for number, rank in zip((1, 0), found["ranks"]):
        rank["parallelism_info"] = [{"role": "target", "tp_rank": number}]
    assert differences(ranks, found) == []
    assert "its tensor-parallel size is 1" in differences(ranks, report({"a": "5"}))[0]
