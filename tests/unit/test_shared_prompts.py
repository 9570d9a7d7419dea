"""A group's prompt packed once: the same rows, labels, attention, losses and gradients as packed for every sample."""

import math

import numpy as np
import pytest
import torch
from helpers.models import save_tiny_model, tiny_config
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laser.batching import PackInput, pack
from megatron_laser.batching.shared_prompts import common_beginning, shared_units, unit_tokens
from megatron_laser.errors import ConfigError
from megatron_laser.model import platform

platform.install()

from helpers.packed import packed_params  # noqa: E402

from megatron_laser.model.hf_config import transformer_config  # noqa: E402
from megatron_laser.model.torch_layers import PackedSdpaAttention, share_prompts  # noqa: E402
from megatron_laser.trainer.step_data import prepare_step  # noqa: E402

EOS, SCORE = 90, 99
HEADS, HEAD_DIM = 4, 16


def packed(sequences, *, share=True, pad_multiple=1, score=SCORE):
    return pack(
        sequences, score_token_id=score, pad_multiple=pad_multiple, inv_temperature=1.25, share_prompts=share
    )


def test_a_micro_batch_written_by_hand():
    result = packed(
        [
            PackInput(7, [1, 2, 3], [11, EOS], True, 5),
            PackInput(8, [1, 2, 3], [12, 13, 14], False, 5),
            PackInput(9, [4, 5], [15, EOS], True, 6),  # alone of its group: packed as ever
            PackInput(2, [6], [16, EOS], True, 7),  # a prompt of one token: nothing would be left to share
            PackInput(3, [6], [17], False, 7),
        ],
        pad_multiple=8,
    )
    # index:                          0  1  2  3   4    5  6   7   8   9  10 11  12   13 14  15   16 17 ..
    assert (
        result.tokens.tolist()
        == [1, 2, 3, 11, EOS, 3, 12, 13, 14, 4, 5, 15, EOS, 6, 16, EOS, 6, 17] + [0] * 6
    )
    assert result.cu_seqlens.tolist() == [0, 2, 5, 9, 13, 16, 18, 24]
    assert result.parents.tolist() == [-1, 0, 0, -1, -1, -1, -1]
    assert result.position_ids[:9].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert result.position_ids[9:18].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert result.max_seqlen == 6
    rows = zip(
        result.row_index.tolist(),
        result.labels.tolist(),
        result.sample_index.tolist(),
        result.response_position,
    )
    assert list(rows) == [
        *((2, 11, 7, 0), (3, EOS, 7, 1), (4, SCORE, 7, 2)),
        *((5, 12, 8, 0), (6, 13, 8, 1), (7, 14, 8, 2)),
        *((10, 15, 9, 0), (11, EOS, 9, 1), (12, SCORE, 9, 2)),
        *((13, 16, 2, 0), (14, EOS, 2, 1), (15, SCORE, 2, 2), (16, 17, 3, 0)),
    ]


COMMON = list(range(20, 60))


@pytest.mark.parametrize(
    ("prompts", "common"),
    [
        ([[*COMMON, 5], [*COMMON, 6, 7, 8], [*COMMON, 5, 9]], 40),
        ([COMMON, [*COMMON, 6]], 39),  # one token of each is left, to predict from
        ([COMMON, COMMON], 39),
        ([[*COMMON[:15], 5], [*COMMON[:15], 6]], 0),  # too few
        ([COMMON], 0),
        ([COMMON, [7, *COMMON]], 0),
    ],
)
def test_what_all_prompts_begin_with_is_found(prompts, common):
    assert common_beginning(prompts) == common
    assert common_beginning([np.array(prompt) for prompt in prompts]) == common


groups = st.lists(
    st.tuples(
        st.lists(st.integers(1, 80), min_size=1, max_size=9),
        st.lists(st.tuples(st.lists(st.integers(1, 80), max_size=9), st.booleans()), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(groups=groups, pad_multiple=st.sampled_from([1, 4, 16]), beginning=st.sampled_from([0, 16, 40]))
def test_every_labelled_row_sees_what_it_saw_and_has_its_label(groups, pad_multiple, beginning):
    groups = [([*COMMON[:beginning], *prompt], responses) for prompt, responses in groups]
    samples = [
        PackInput(10 * number + index, prompt, response, scored, number)
        for number, (prompt, responses) in enumerate(groups)
        for index, (response, scored) in enumerate(responses)
    ]
    shared, plain = (packed(samples, share=share, pad_multiple=pad_multiple) for share in (True, False))
    for name in ("labels", "is_score", "sample_index", "response_position", "inv_temperature"):
        assert np.array_equal(getattr(shared, name), getattr(plain, name)), name
    assert (np.diff(shared.row_index) > 0).all()
    assert len(shared.tokens) % pad_multiple == 0
    assert len(shared.tokens) <= len(plain.tokens)
    for mine, theirs in zip(shared.row_index, plain.row_index, strict=True):
        assert seen_by(shared, mine) == seen_by(plain, theirs)
        assert shared.position_ids[mine] == plain.position_ids[theirs] == len(seen_by(plain, theirs)) - 1
    assert shared.max_seqlen >= shared.position_ids.max() + 1
    tokens = sum(unit_tokens(len(p), [len(response) for response, _ in responses]) for p, responses in groups)
    tokens -= (len(groups) - 1) * common_beginning([prompt for prompt, _ in groups])
    # A prompt that is all beginning but for its last token has nothing of its own to pack once, nor one of a sample.
    assert len(shared.tokens) <= max(-(-tokens // pad_multiple) * pad_multiple, pad_multiple, 2)


def seen_by(batch, row):
    """The tokens that a causal attention with `parents` lets a row see, in order."""
    sequence = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
    own = batch.tokens[batch.cu_seqlens[sequence] : row + 1].tolist()
    while batch.parents is not None and (sequence := batch.parents[sequence]) >= 0:
        own = batch.tokens[batch.cu_seqlens[sequence] : batch.cu_seqlens[sequence + 1]].tolist() + own
    return own


def test_nothing_is_shared_unless_asked_and_known():
    same = [PackInput(0, [1, 2], [3], False, 4), PackInput(1, [1, 2], [4], False, 4)]
    unknown = [PackInput(0, [1, 2], [3], False), PackInput(1, [1, 2], [4], False)]
    assert packed(same, share=False).parents is None
    assert packed(unknown).parents is None
    assert packed(same).parents is not None
    with pytest.raises(ValueError, match="context_size=2"):
        pack(
            same, score_token_id=None, pad_multiple=4, inv_temperature=1.0, context_size=2, share_prompts=True
        )


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(0, 30), min_size=1, max_size=8)),
        min_size=1,
        max_size=6,
    ),
    budget=st.integers(1, 120),
    least=st.integers(1, 9),
)
def test_units_are_runs_of_a_group_that_fit(groups, budget, least):
    ids = [number for number, (_, responses) in enumerate(groups) for _ in responses]
    prompts = [prompt for prompt, responses in groups for _ in responses]
    lengths = [length for _, responses in groups for length in responses]
    units = shared_units(ids, prompts, lengths, budget=budget, least=least)
    assert [i for unit in units for i in unit] == list(range(len(ids)))
    for unit in units:
        assert len({ids[i] for i in unit}) == 1
        assert len(unit) == 1 or unit_tokens(prompts[unit[0]], [lengths[i] for i in unit]) <= budget
    each = -(-least // len(groups))
    for number, (_, responses) in enumerate(groups):
        assert sum(ids[unit[0]] == number for unit in units) >= min(each, len(responses))


# Prompt length and response lengths of each group, with prompts much longer, equal and shorter than responses.
CASES = {
    "one group": [(7, [5, 1, 12])],
    "long prompts": [(40, [3, 4, 3, 5]), (33, [2, 2])],
    "of very different lengths": [(3, [50, 1, 7]), (20, [9, 9, 9, 9]), (2, [1, 1])],
    "with sequences that share nothing": [(6, [4]), (9, [3, 3]), (1, [8, 8])],
    "with a common beginning": [(40, [3, 4, 3, 5]), (33, [2, 2]), (50, [7])],
    "that is all of a prompt": [(33, [3, 4]), (33, [2, 2]), (50, [7, 1, 30])],
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=lambda n: f"{n} kv heads")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_and_gradients_are_those_of_whole_sequences(case, request, kv_heads):
    alike = 32 if "beginning" in request.node.name or "all of a prompt" in request.node.name else 0
    samples = [
        PackInput(
            10 * number + index, [1] * alike + [2 + number] * (prompt - alike), [2] * length, True, number
        )
        for number, (prompt, lengths) in enumerate(case)
        for index, length in enumerate(lengths)
    ]
    batch = packed(samples, pad_multiple=16)
    assert (batch.parents == 0).sum() >= 3 or not alike  # the beginning has children
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, 3.0), (kv_heads, 1.0), (kv_heads, 1.0))
    tokens = len(batch.tokens)
    inputs = [torch.randn(tokens, heads, HEAD_DIM, generator=generator) * scale for heads, scale in shapes]
    weights = torch.randn(tokens, HEADS, HEAD_DIM, generator=generator)
    params = packed_params(np.diff(batch.cu_seqlens).tolist())
    share_prompts(params, batch.parents, torch.from_numpy(batch.position_ids))
    mine = [x.clone().requires_grad_() for x in inputs]
    config = transformer_config(tiny_config("qwen2"), dtype=torch.float32)
    attention = PackedSdpaAttention(config, layer_number=1, attn_mask_type=None, attention_type="self")
    out = attention(*mine, attention_mask=None, packed_seq_params=params)
    (out * weights).sum().backward()
    plain = [x.double().requires_grad_() for x in inputs]
    expected = reference(*plain, batch)
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    for got, want in zip(mine, plain):
        torch.testing.assert_close(
            got.grad, want.grad.float(), atol=2e-5, rtol=1e-5
        )  # of sums of up to 60 terms


def reference(q, k, v, batch):
    """Attention with one dense mask over all packed tokens."""
    tokens = len(batch.tokens)
    sequence = torch.repeat_interleave(torch.from_numpy(np.diff(batch.cu_seqlens)))
    parents = torch.from_numpy(np.append(batch.parents, -1))  # -1's parent is -1
    positions = torch.arange(tokens)
    visible = (sequence[:, None] == sequence) & (positions[:, None] >= positions)
    above = sequence
    for _ in range(3):
        above = parents[above]
        visible |= above[:, None] == sequence
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(~visible, -math.inf).softmax(-1), v)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared_prompts") / "model"
    save_tiny_model(folder, "qwen2")
    return folder


GROUPS = [
    [Response(5, True), Response(12, False), Response(20, False, truncated=True)],
    [Response(2, False), Response(9, False), Response(14, True), Response(6, False)],
    [Response(4, True), Response(1, False)],
]


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("budget", [48, 1024])
def test_every_sample_is_trained_on_once_by_one_rank_within_the_budget(
    model, tmp_path, ranks, minibatches, budget
):
    flat = rollout_batch(GROUPS)
    config = run_config(
        tmp_path,
        model,
        *("data.max_prompt_tokens=16", "rollout.max_new_tokens=32"),
        *(f"batching.tokens_per_micro_batch={budget}", f"policy.minibatches={minibatches}"),
    )
    data = [
        prepare_step(
            flat,
            config,
            score_token_id=SCORE_TOKEN,
            data_rank=rank,
            data_size=ranks,
            context_rank=0,
            share_prompts=True,
        )
        for rank in range(ranks)
    ]
    batches = [batch for one in data for batch in one.micro_batches]
    seen = [sample for batch in batches for sample in set(batch.policy_sample.tolist())]
    assert sorted(seen) == list(range(flat.num_samples))
    assert all(batch.tokens.numel() <= budget for batch in batches)
    # Five ranks want two pieces each for three groups of two to four samples: nearly every sample is one.
    assert any(hasattr(batch.packed, "parents") for batch in batches) or ranks == 5
    for m in range(minibatches):
        assert len({len(one.minibatches[m].micro_batches) for one in data}) == 1


def test_what_cannot_share_prompts_is_said_before_weights_are_read(model, tmp_path):
    from megatron_laser.config.checks.layout import check_layout
    from megatron_laser.config.model_folder.architecture import read_architecture

    config = run_config(
        tmp_path,
        model,
        "batching.share_prompts=true",
        "parallel.context=2",
        "batching.tokens_per_micro_batch=64",
    )
    with pytest.raises(ConfigError, match=r"batching\.share_prompts: true, but parallel\.context is 2"):
        check_layout(config, read_architecture(model), 2)


def test_layers_of_transformer_engine_share_nothing(model, tmp_path, monkeypatch):
    from megatron_laser.model import machine

    monkeypatch.setattr(machine, "use_transformer_engine", lambda layers: True)
    monkeypatch.setattr(machine, "fp8_problems", lambda recipe, layers: [])
    config = run_config(tmp_path, model, "batching.share_prompts=true")
    assert any(
        "batching.share_prompts: true is for layers of torch" in one
        for one in machine.memory_setting_problems(config)
    )
    config = run_config(tmp_path, model)
    assert not any("share_prompts" in one for one in machine.memory_setting_problems(config))
