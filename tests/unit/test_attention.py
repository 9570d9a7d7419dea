"""Packed attention and rotary embedding against plain per-sequence references."""

import math

import pytest
import torch
from helpers.models import tiny_config

from megatron_laser.model import platform

platform.install()

from helpers.packed import packed_params  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from megatron_laser.model.context_attention import repeat_heads  # noqa: E402
from megatron_laser.model.hf_config import transformer_config  # noqa: E402
from megatron_laser.model.policy_model import PolicyModel  # noqa: E402
from megatron_laser.model.torch_layers import PackedSdpaAttention, padded_layout  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
# Longest first, last and in between; ones; equal lengths; a padding sequence at the end.
LENGTH_CASES = {
    "mixed with padding": (3, 90, 1, 17, 16, 1, 33, 90, 2, 5),
    "one sequence": (12,),
    "all of one token": (1, 1, 1),
    "powers of two": (1, 2, 4, 8, 16, 32, 64),
    "with an empty sequence": (4, 0, 7),
}


def attention():
    config = transformer_config(tiny_config("qwen2"), dtype=torch.float32)
    return PackedSdpaAttention(config, layer_number=1, attn_mask_type=None, attention_type="self")


def reference_attention(q, k, v, lengths):
    """softmax(q k^T / sqrt(d) + causal mask) v in float64, one sequence and one head at a time."""
    out = torch.zeros_like(q)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // k.shape[1])
            logits = q[rows, head] @ k[rows, kv_head].T / math.sqrt(q.shape[2])
            weights = logits.masked_fill(future, -math.inf).softmax(-1)
            out[rows, head] = weights @ v[rows, kv_head]
        start += length
    return out


def random_qkv(tokens, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((HEADS, 3.0), (kv_heads, 1.0), (kv_heads, 1.0))
    return [torch.randn(tokens, heads, HEAD_DIM, generator=generator) * scale for heads, scale in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=lambda n: f"{n} kv heads")
@pytest.mark.parametrize("lengths", LENGTH_CASES.values(), ids=LENGTH_CASES.keys())
def test_packed_attention_and_its_gradients_equal_attention_on_each_sequence_alone(lengths, kv_heads):
    inputs = random_qkv(sum(lengths), kv_heads)
    weights = torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    mine = [x.clone().requires_grad_() for x in inputs]
    out = attention()(*mine, attention_mask=None, packed_seq_params=packed_params(lengths))
    (out * weights).sum().backward()

    plain = [x.double().requires_grad_() for x in inputs]
    expected = reference_attention(*plain, lengths)
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    for got, want in zip(mine, plain):
        torch.testing.assert_close(got.grad, want.grad.float(), atol=5e-6, rtol=1e-5)


def test_no_value_of_another_sequence_reaches_a_row():
    lengths = (5, 9, 2)
    q, k, v = random_qkv(sum(lengths))
    before = attention()(q, k, v, attention_mask=None, packed_seq_params=packed_params(lengths))
    k[5:14], v[5:14], q[5:14] = 1e4, -1e4, 3.0
    after = attention()(q, k, v, attention_mask=None, packed_seq_params=packed_params(lengths))
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[14:], after[14:])


def test_unpacked_input_is_causal_attention_too():
    q, k, v = random_qkv(12)
    # [tokens, heads, dim] of two sequences of 6 -> [6, 2, heads, dim]
    s, b = 6, 2
    shaped = [x.reshape(b, s, *x.shape[1:]).transpose(0, 1) for x in (q, k, v)]
    out = attention()(*shaped, attention_mask=None)
    expected = reference_attention(q.double(), k.double(), v.double(), (s, s)).float()
    torch.testing.assert_close(out, expected.reshape(b, s, -1).transpose(0, 1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", LENGTH_CASES.values(), ids=LENGTH_CASES.keys())
def test_every_row_has_one_slot_and_at_most_half_of_a_batch_is_padding(lengths):
    layout = padded_layout(packed_params(lengths).cu_seqlens_q)
    rows = torch.cat([batch.rows for batch in layout.batches])
    assert sorted(rows.tolist()) == list(range(sum(lengths)))
    assert torch.equal(rows[layout.inverse], torch.arange(sum(lengths)))
    for batch in layout.batches:
        assert len(batch.rows) * 2 >= batch.batch * batch.width
        assert torch.equal(batch.gather[batch.slots], batch.rows)


def test_layout_is_worked_out_once_per_micro_batch():
    params = packed_params((3, 4))
    q, k, v = random_qkv(7)
    attention()(q, k, v, attention_mask=None, packed_seq_params=params)
    first = params.padded_layout
    attention()(q, k, v, attention_mask=None, packed_seq_params=params)
    assert params.padded_layout is first


def rotary_frequencies(positions):
    inverse = 1.0 / 100.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(positions)[:, None] * inverse
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def reference_rotary(t, lengths, freqs):
    """Megatron-Core's loop: positions start at 0 in every sequence. t [tokens, heads, dim]."""
    parts = []
    for x in torch.split(t, list(lengths)):
        angles = freqs[: len(x), 0]  # [length, 1, dim]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        parts.append(x * angles.cos() + turned * angles.sin())
    return torch.cat(parts)


@pytest.mark.parametrize("lengths", LENGTH_CASES.values(), ids=LENGTH_CASES.keys())
def test_vectorised_rotary_embedding_equals_the_loop_over_sequences(single_process, lengths):
    group = parallel_state.get_context_parallel_group()
    params = packed_params(lengths)
    freqs = rotary_frequencies(params.max_seqlen_q)
    t = random_qkv(sum(lengths))[0].requires_grad_()
    got = rope_utils._apply_rotary_pos_emb_thd(t, params.cu_seqlens_q, freqs, cp_group=group)
    expected = reference_rotary(t, lengths, freqs)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad((x**2 * x.detach().sin()).sum(), t)[0] for x in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [*LENGTH_CASES.values(), (3, 90)], ids=[*LENGTH_CASES, "two"])
@pytest.mark.parametrize("extra", [0, 7], ids=["longest", "longer"])
def test_vectorised_rotary_embedding_equals_megatrons_own(single_process, lengths, extra):
    group = parallel_state.get_context_parallel_group()
    params = packed_params(lengths)
    freqs = rotary_frequencies(params.max_seqlen_q + extra)
    t = random_qkv(sum(lengths))[0]
    apply = rope_utils._apply_rotary_pos_emb_thd
    got, expected = (one(t, params.cu_seqlens_q, freqs, cp_group=group) for one in (apply, apply.original))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_as_many_frequencies_as_packed_tokens_are_one_for_each_token_as_upstream_has_it(single_process):
    # Megatron-Core 0.19 takes them for positions over the whole batch. A rotary length of max_seqlen never is one of
    # several sequences, so a run does not get there; both paths must agree all the same.
    group = parallel_state.get_context_parallel_group()
    params = packed_params((5, 9, 2))
    freqs = rotary_frequencies(16)
    t = random_qkv(16)[0]
    apply = rope_utils._apply_rotary_pos_emb_thd
    got, expected = (one(t, params.cu_seqlens_q, freqs, cp_group=group) for one in (apply, apply.original))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert (got - reference_rotary(t, (5, 9, 2), freqs)).abs().max() > 0.1


@pytest.mark.parametrize("lengths", [(7, 7), (3, 9, 2), (12,)], ids=str)
def test_a_packed_model_gives_each_sequence_what_it_has_alone_on_both_rotary_paths(
    single_process, monkeypatch, lengths
):
    hf = tiny_config("qwen3")
    torch.manual_seed(0)
    model = PolicyModel(transformer_config(hf, dtype=torch.float32), hf, vocab_multiple=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(2, hf.vocab_size, (sum(lengths),))

    def logits(pieces):
        given = torch.cat(pieces)[None]
        positions = torch.cat([torch.arange(len(piece)) for piece in pieces])[None]
        return model(
            given, positions, None, packed_seq_params=packed_params([len(piece) for piece in pieces])
        )[0]

    pieces = tokens.split(lengths)
    with torch.no_grad():
        alone = torch.cat([logits([piece]) for piece in pieces])
        together = logits(pieces)
        upstream = rope_utils._apply_rotary_pos_emb_thd.original
        monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_thd", upstream)
        unpatched = logits(pieces)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unpatched, alone, atol=1e-5, rtol=1e-5)


def test_key_and_value_heads_are_repeated_for_their_own_query_heads():
    q, k, v = (x[None].transpose(1, 2) for x in random_qkv(9))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wide = (repeat_heads(x, HEADS) for x in (k, v))
    torch.testing.assert_close(
        torch.nn.functional.scaled_dot_product_attention(q, *wide, is_causal=True), expected
    )
    assert repeat_heads(q, HEADS) is q


def test_rotary_embedding_without_a_group_is_refused_as_upstream_does(single_process):
    t, params = random_qkv(4)[0], packed_params((4,))
    with pytest.raises(ValueError, match="cp_group"):
        rope_utils._apply_rotary_pos_emb_thd(t, params.cu_seqlens_q, torch.zeros(4, 1, 1, HEAD_DIM))


def test_angles_are_those_of_megatron_and_one_table_is_kept(single_process):
    hf = tiny_config("qwen3")
    model = PolicyModel(transformer_config(hf, dtype=torch.float32), hf, vocab_multiple=1)
    rotary = model.rotary_pos_emb
    for length in (5, 40, 7, 40, 12):
        assert torch.equal(rotary(length, packed_seq=True), rotary.get_emb(length))
    assert rotary(9, packed_seq=True).untyped_storage().nbytes() == 40 * 32 * 4
    assert torch.equal(rotary(6, offset=3), rotary.get_emb(6, 3))
