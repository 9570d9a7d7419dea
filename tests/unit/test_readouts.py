"""Readouts: scores, losses and targets by hand, and the rows that they become."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.rollouts import Response, rollout_batch

from megatron_laser.algorithms.readouts import group_shrunk_labels, readout_loss, readout_scores
from megatron_laser.algorithms.self_reward import self_reward_loss, self_reward_scores
from megatron_laser.batching.packing import pack
from megatron_laser.batching.readout_points import at_end, before_end, every, prefix_values, readout_points
from megatron_laser.config import ConfigError, load_config
from megatron_laser.config.readouts import readouts
from megatron_laser.data.delimiters import Delimiter
from megatron_laser.model import platform

platform.install()

from megatron_laser.trainer import run_readouts  # noqa: E402

LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -1.5, -2.5], [-2.0, -2.0, -2.0]], dtype=torch.float64)
LABELS = torch.tensor([1.0, 0.0, 0.75], dtype=torch.float64)
RIGHT = torch.tensor([True, False, True])
WEIGHTS = (0.75, 1.5)
COMMON = {"class_weights": WEIGHTS, "count": 5}


def probabilities(kind, tokens):
    """[points]: the readout's probability, by hand."""
    p = [[math.exp(value) for value in row[:tokens]] for row in LOGPROBS.tolist()]
    return [row[0] if kind == "scaled_logratio" else row[0] / sum(row) for row in p]


@pytest.mark.parametrize(
    ("kind", "tokens"), [("scaled_logratio", 1), ("pair_sigmoid", 2), ("normalised", 2), ("normalised", 3)]
)
@pytest.mark.parametrize("loss", ["mse", "brier", "bce", "margin"])
def test_losses_are_those_of_the_formulas(kind, tokens, loss):
    p, ref, beta = probabilities(kind, tokens), -6.0, 0.4
    scores = [beta * (math.log(x) - ref) for x in p] if kind == "scaled_logratio" else p
    by_hand = {
        "mse": lambda s, x, t: (s - t) ** 2,
        "brier": lambda s, x, t: (x - t) ** 2,
        "bce": lambda s, x, t: -t * math.log(x) - (1 - t) * math.log(1 - x),
        "margin": lambda s, x, t: max(0.0, 0.8 - (2 * t - 1) * (2 * s - 1)),
    }[loss]
    weights = [WEIGHTS[0] if right else WEIGHTS[1] for right in RIGHT]
    rows = zip(weights, scores, p, LABELS.tolist(), strict=True)
    expected = sum(w * by_hand(s, x, t) for w, s, x, t in rows) / 5
    logprobs = LOGPROBS[:, :tokens].clone().requires_grad_()
    settings = {"kind": kind, "loss": loss, "beta": beta, "ref_logprob": ref, "margin": 0.8, **COMMON}
    found = readout_loss(logprobs, LABELS, RIGHT, **settings)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert readout_scores(logprobs, kind=kind, beta=beta, ref_logprob=ref).tolist() == pytest.approx(scores)
    assert torch.autograd.gradcheck(lambda x: readout_loss(x, LABELS, RIGHT, **settings), (logprobs,))


def test_two_tokens_of_equation_16_are_pushed_up_for_right_and_for_wrong():
    logprobs = LOGPROBS[:, :2].clone().requires_grad_()
    found = readout_loss(logprobs, LABELS, RIGHT, kind="scaled_logratio", loss="bce", **COMMON)
    (gradient,) = torch.autograd.grad(found, logprobs)
    expected = [[-0.75, 0.0], [0.0, -1.5], [-0.75 * 0.75, -0.75 * 0.25]]
    torch.testing.assert_close(gradient, torch.tensor(expected).double() / 5)


def test_targets_are_the_scale_of_a_pair_too():
    read = LOGPROBS[:, :2]
    share = torch.sigmoid(read[:, 0] - read[:, 1])
    found = readout_scores(read, kind="pair_sigmoid", targets=(0.9, 0.1))
    torch.testing.assert_close(found, (share - 0.1) / 0.8)
    loss = readout_loss(read, LABELS, RIGHT, kind="pair_sigmoid", loss="mse", targets=(0.9, 0.1), **COMMON)
    weights = torch.tensor([WEIGHTS[0], WEIGHTS[1], WEIGHTS[0]]).double()
    torch.testing.assert_close(loss, (weights * (share - (0.1 + 0.8 * LABELS)) ** 2).sum() / 5)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_one_token_is_the_papers_self_reward_to_the_last_bit(loss):
    read, labels = LOGPROBS[:, :1].float() - 5.0, torch.tensor([1.0, 0.0, 1.0])
    scores = self_reward_scores(read[:, 0], ref_logprob=-6.0, beta=0.4)
    keywords = {"class_weights": WEIGHTS, "kind": loss, "ref_logprob": -6.0, "beta": 0.4}
    expected = self_reward_loss(scores, labels, num_scored=5, **keywords)
    found = readout_loss(
        read, labels, RIGHT, kind="scaled_logratio", loss=loss, beta=0.4, ref_logprob=-6.0, **COMMON
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "tokens"), [("pair_sigmoid", 3), ("pair_sigmoid", 1), ("normalised", 1)])
def test_a_score_of_the_wrong_number_of_tokens_is_refused(kind, tokens):
    with pytest.raises(ValueError, match="expected \\[points, tokens\\] with"):
        readout_scores(LOGPROBS[:, :tokens], kind=kind)


def test_labels_shrink_towards_the_mean_of_their_group():
    found = group_shrunk_labels(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 7]), gamma=0.7)
    assert found.tolist() == pytest.approx([0.7 + 0.1, 0.1, 0.1, 1.0])


def batch():
    """Two groups; responses of 5, 7 (cut off), 4 and 1 tokens, with equal beginnings in the first group."""
    flat = rollout_batch(
        [[Response(5, True), Response(7, False, truncated=True)], [Response(4, False), Response(1, True)]]
    )
    ids = [flat.response_ids(i) for i in range(4)]
    ids[1][:3] = ids[0][:3]
    ids[1][3] = ids[0][3] + 1
    return flat


def test_points_stand_where_they_are_asked_for():
    flat = batch()
    points = readout_points(flat, [at_end, before_end, every(2)], [(80,), (81, 82), (83,)])
    assert points.counts.tolist() == [3, 3, 6]
    assert points.sample.tolist() == [0, 2, 3, 0, 2, 3, 0, 0, 1, 1, 1, 2]
    assert points.offset.tolist() == [5, 4, 1, 4, 3, 0, 2, 4, 2, 4, 6, 2]
    assert points.slot_starts.tolist() == [0, 3, 9, 15]
    marks = points.marks(2)
    rows = sorted(zip(marks.offset.tolist(), marks.label.tolist(), marks.slot.tolist()))
    assert rows == [(2, 83, 14), (3, 81, 5), (3, 82, 6), (4, 80, 1)]


def test_rows_of_readouts_stand_at_their_places_among_the_others():
    flat = batch()
    points = readout_points(flat, [at_end, before_end, every(2)], [(80,), (81, 82), (83,)])
    samples = [flat.pack_input(i) for i in (2, 1)]
    samples = [type(s)(*(getattr(s, n) for n in ("sample_index", "prompt_ids", "response_ids", "scored", "group")),
                       marks=points.marks(s.sample_index)) for s in samples]  # fmt: skip
    packed = pack(samples, score_token_id=None, pad_multiple=1, inv_temperature=1.25)
    assert (np.diff(packed.row_index) >= 0).all()
    starts = {2: 0, 1: len(flat.prompt_ids(2)) + 4}
    for sample in (2, 1):
        own, ids = packed.sample_index == sample, flat.response_ids(sample).tolist()
        policy, read = own & ~packed.is_score, own & packed.is_score
        assert packed.labels[policy].tolist() == ids
        first = starts[sample] + len(flat.prompt_ids(sample)) - 1
        assert packed.row_index[policy].tolist() == list(range(first, first + len(ids)))
        assert (packed.row_index[read] == first + packed.response_position[read]).all()
        marks = points.marks(sample)
        assert sorted(packed.slot[read].tolist()) == sorted(marks.slot.tolist())
        for slot, label in zip(packed.slot[read].tolist(), packed.labels[read].tolist()):
            assert label == marks.label[marks.slot == slot]
    assert set(packed.inv_temperature[packed.is_score]) == {np.float32(1.0)}


def test_the_value_of_a_prefix_is_the_mean_of_the_responses_that_begin_so():
    flat = batch()
    sample = np.array([0, 0, 0, 1, 1, 2])
    offset = np.array([0, 3, 4, 3, 4, 4])
    # responses 0 (right) and 1 (wrong) share three tokens; the groups are apart
    assert prefix_values(flat, sample, offset).tolist() == [0.5, 0.5, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", "\n\n", "b", "\n", "\n", "c"], [2, 5]),
        (["a.\n", "\nb\n", "\n\n", "\n"], [2, 3, 4]),
        (["\n", "a", "\n"], []),
        ([".\n\nx", "y"], [1]),
    ],
)
def test_a_delimiter_is_found_whichever_tokens_it_is_cut_into(pieces, expected):
    vocabulary = sorted(set(pieces))
    delimiter = Delimiter("\n\n", vocabulary.__getitem__, len(vocabulary))
    assert delimiter.ends(np.array([vocabulary.index(piece) for piece in pieces])).tolist() == expected


def test_a_delimiter_passes_over_rows_of_the_model_that_are_no_tokens(monkeypatch, tmp_path):
    pieces = ["a", "\n\n"]
    tokenizer = type(
        "Tokenizer", (), {"__len__": lambda self: 2, "decode": lambda self, ids, **_: pieces[ids[0]]}
    )()
    monkeypatch.setattr(run_readouts, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(run_readouts, "read_architecture", lambda folder: SimpleNamespace(vocab_size=90))
    flat = batch()
    flat.response_ids(0)[:] = [0, 1, 80, 1, 0]
    second = readouts(configured(tmp_path, "[{}, {position: {delimiter: '\\n\\n'}}]"))[1]
    config = load_config_of(tmp_path)
    assert run_readouts._place(config, replace(second, delimiter="\n\n"))(flat, 0).tolist() == [2, 4]


CONFIG = """
model: {{path: {folder}/model}}
data: {{train: {folder}/train.jsonl}}
laser: {{score_token: 7, ref_logprob: -20.0, alpha: 0.3, tau: 0.2, reasoning_warmup_steps: 5{more}}}
run: {{steps: 3, output_dir: {folder}/run}}
"""


def configured(folder, entries):
    file = folder / "run.yaml"
    file.write_text(CONFIG.format(folder=folder, more=f", readouts: {entries}"))
    return load_config(file)


def test_what_an_entry_leaves_out_is_as_the_section_has_it(tmp_path):
    short = readouts(load_config_of(tmp_path))
    assert readouts(configured(tmp_path, "[{}]")) == short
    (only,) = short
    assert (only.tokens, only.weight, only.advantages, only.tau) == ((7,), 0.3, "mix", 0.2)
    assert (only.first_step, only.advantages_first_step) == (6, 206)
    first, second = readouts(
        configured(
            tmp_path, "[{name: end}, {tokens: [8, 9], score: pair_sigmoid, position: {every: 4}, weight: 0}]"
        )
    )
    assert (first.name, second.name, second.advantages) == ("end", "readout_2", "none")
    assert (second.position, second.every, second.first_step, second.advantages_first_step) == (
        "every",
        4,
        None,
        None,
    )


def load_config_of(folder):
    file = folder / "short.yaml"
    file.write_text(CONFIG.format(folder=folder, more=""))
    return load_config(file)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            "[{position: {every: 4}}]",
            r"laser.readouts\[0\].position: every; the first readout is the response's",
        ),
        (
            "[{score: pair_sigmoid}]",
            r"laser.readouts\[0\].score: pair_sigmoid reads 2 tokens, and laser.score_token",
        ),
        (
            "[{tokens: 7, score: pair_sigmoid}]",
            r"laser.readouts\[0\].tokens: 1 with score pair_sigmoid, which reads 2",
        ),
        ("[{}, {name: readout_1}]", "laser.readouts: names are readout_1, readout_1"),
        (
            "[{tokens: [7, 8]}]",
            r"laser.readouts\[0\].tokens: two with score scaled_logratio and laser.loss mse",
        ),
        ("[{}, {position: {every: 4}, advantages: mix}]", "scores of prefixes change no advantages"),
        ("[{beta: 0.01}]", r"laser.readouts\[0\].beta 0.01 with laser.ref_logprob -20"),
        ("[{loss: brier, targets: [1, -1]}]", r"laser.readouts\[0\].targets: .*loss brier"),
        (
            "[{tokens: [7, 8], score: pair_sigmoid, targets: [1, -1]}]",
            r"laser.readouts\[0\].targets: \[1, -1\] with score pair_sigmoid, .* never outside 0 to 1",
        ),
        ("[{discrepancy_bounds: [2, 3]}]", "expected 0 <= low <= 1 <= high"),
        ("[{position: {sometimes: 4}}]", r"laser.readouts\[0\].position: expected eos, before_eos"),
        ("[{position: {every: 0}}]", r"laser.readouts\[0\].position: expected"),
        ("[{wieght: 1}]", r"laser.readouts\[0\].wieght: unknown key; the keys of a readout are name, tokens"),
        ("[{advantages: mine}]", r"laser.readouts\[0\].advantages: expected 'mix', 'discrepancy' or 'none'"),
        ("[{}, {}], score_source: server", "laser.score_source: server with laser.readouts"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, entries, message):
    with pytest.raises(ConfigError, match=message):
        configured(tmp_path, entries)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # the value that is wrong stands in the entry, or in `laser`, whatever form the rest has
        ("readouts: [{}, {beta: 0.01}]", "laser.readouts[1].beta 0.01 with laser.ref_logprob -20:"),
        ("readouts: [{}, {ref_logprob: -2}]", "laser.beta 0.1 with laser.readouts[1].ref_logprob -2:"),
        # 1 / log(1 + 0.05 e^2) = 3.1805...
        ("readouts: [{ref_logprob: -2}]", "Set laser.beta to 3.19 or more"),
        ("readouts: [{}, {}], beta: 0.01", "laser.beta 0.01 with laser.ref_logprob -20:"),
        ("readouts: [{}, {}], targets: [0, 1]", "laser.targets: [right, wrong] = [0, 1]"),
        ("readouts: [{}, {targets: [0, 1]}]", "laser.readouts[1].targets: [right, wrong] = [0, 1]"),
        ("targets: [0, 1]", "laser.targets: [right, wrong] = [0, 1]"),
        (
            "readouts: [{loss: bce}], targets: [1, -1]",
            "laser.targets: [1, -1] with laser.readouts[0].loss bce, whose labels are always [1.0, 0.0]; remove "
            "laser.targets or set laser.readouts[0].loss to mse",
        ),
        (
            "readouts: [{targets: [1, -1]}], loss: bce",
            "laser.readouts[0].targets: [1, -1] with laser.loss bce, whose labels are always [1.0, 0.0]; remove "
            "laser.readouts[0].targets or set laser.loss to mse",
        ),
        (
            "readouts: [{}, {}], ref_logprob: null",
            "laser.readouts[1].ref_logprob: required while laser.enabled is true",
        ),
    ],
)
def test_a_message_names_the_setting_that_was_written(tmp_path, settings, message):
    with pytest.raises(ConfigError) as caught:
        configured_as(tmp_path, settings)
    assert message in str(caught.value)
    assert len(set(caught.value.problems)) == len(caught.value.problems)


def configured_as(folder, settings):
    """`settings` in the section `laser`, in place of what the others have."""
    file = folder / "run.yaml"
    text = CONFIG.format(folder=folder, more=", " + settings)
    if "ref_logprob: null" in settings:
        text = text.replace("ref_logprob: -20.0, ", "")
    file.write_text(text)
    return load_config(file)
