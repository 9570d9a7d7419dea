"""Readouts behind a text that is forced upon responses which were cut off: what is learned and refused."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.cut_off import CUT, GROUPS, IDS
from helpers.models import save_word_tokenizer, tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from tokenizers import Tokenizer

from megatron_laser.model import platform

platform.install()

from megatron_laser.config import ConfigError, read_architecture, resolve_plan  # noqa: E402
from megatron_laser.config.model_folder.continuation import longest_trained, planned_ids  # noqa: E402
from megatron_laser.config.model_folder.special_tokens import read_vocabulary  # noqa: E402
from megatron_laser.config.readouts import readouts  # noqa: E402
from megatron_laser.data.tokenizer import load_tokenizer, text_ids  # noqa: E402
from megatron_laser.observability.rollout_metrics import readout_metrics  # noqa: E402
from megatron_laser.run.preflight.model import ModelInputs  # noqa: E402
from megatron_laser.run.preflight.objectives import forced_findings, readout_findings  # noqa: E402
from megatron_laser.trainer.run_readouts import RunReadouts  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402

A, B = SCORE_TOKEN - 1, SCORE_TOKEN - 2
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, 245)), *(f"<|{i}|>" for i in range(245, 250))]
TEXT = "w9 w7 <eos>"  # IDS
READOUTS = [
    {"advantages": "mix", "tau": 0.3, "std_threshold": 1e-3},
    {"name": "forced", "position": {"forced": TEXT}, "target": {"group_shrunk": 0.7}, "weight": 0.4},
    {"name": "pair", "tokens": [A, B], "position": {"forced": TEXT}, "score": "pair_sigmoid", "loss": "brier"}
    | {"weight": 0.6, "class_weights": False},
]
LASER = {"alpha": 0.5, "beta": 0.4, "reasoning_warmup_steps": 0, "self_reward_warmup_steps": 0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forced") / "model"
    tiny_model("qwen2").save_pretrained(folder)
    save_word_tokenizer(folder, WORDS)
    return folder


def config_of(folder, model_folder, entries=READOUTS, *, laser=LASER, **sections):
    return run_config(folder, model_folder, laser=laser | {"readouts": entries}, **sections)


def plain_step(flat, advantages, *, reference):
    """name -> loss, and the gradient's norm, of the policy loss and READOUTS in float64; every sample fed whole."""
    model = tiny_model("qwen2").double()
    rewards, groups = flat.rewards.tolist(), flat.group_ids.tolist()
    mean = {g: sum(r for r, h in zip(rewards, groups) if h == g) / groups.count(g) for g in groups}
    policy, end, behind = 0.0, {}, {}
    for i in range(flat.num_samples):
        prompt, ids = flat.prompt_ids(i).tolist(), flat.response_ids(i).tolist()
        more = [] if flat.scored[i] else IDS
        rows = model(torch.tensor([[*prompt, *ids, *more]])).logits[0].log_softmax(-1)
        own = rows[len(prompt) - 1 : len(prompt) - 1 + len(ids)].gather(1, torch.tensor(ids)[:, None])[:, 0]
        start = flat.response_offsets[i]
        old = torch.from_numpy(flat.rollout_logprobs[start : start + len(ids)]).double()
        ratio, a = (own - old).exp(), float(advantages[i])
        terms = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        policy = policy - terms.sum() / int(flat.response_lengths.sum())
        (behind if more else end)[i] = rows[-1]

    def constant(row):
        return row[SCORE_TOKEN].detach() if reference == "model" else -6.0

    def weight(i, members):
        right = sum(rewards[j] > 0.5 for j in members)
        return len(members) / (2 * max(right if rewards[i] > 0.5 else len(members) - right, 1))

    def error(row, target):
        return (0.4 * (row[SCORE_TOKEN] - constant(row)) - target) ** 2

    assert list(behind) == CUT
    labels = {i: 0.7 * rewards[i] + 0.3 * mean[groups[i]] for i in behind}
    shares = {i: torch.sigmoid(row[A] - row[B]) for i, row in behind.items()}
    losses = {
        "policy_loss": policy,
        "self_reward_loss": sum(weight(i, end) * error(row, rewards[i]) for i, row in end.items()) / len(end),
        "readout/forced/loss": sum(weight(i, behind) * error(row, labels[i]) for i, row in behind.items())
        / 3,
        "readout/pair/loss": sum((shares[i] - rewards[i]) ** 2 for i in behind) / 3,
    }
    total = sum(w * loss for w, loss in zip((1.0, 0.5, 0.4, 0.6), losses.values(), strict=True))
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    scores = {i: 0.4 * (row[SCORE_TOKEN].item() - float(constant(row))) for i, row in behind.items()}
    return {k: v.item() for k, v in losses.items()} | {
        "total_loss": total.item(),
        "grad_norm": norm.item(),
    }, scores


@pytest.mark.parametrize(
    ("batching", "reference"),
    [
        ({"tokens_per_micro_batch": 4096, "share_prompts": True}, "constant"),
        ({"tokens_per_micro_batch": 131, "share_prompts": False}, "model"),
    ],
)
def test_a_step_equals_a_plain_computation_that_feeds_the_text(
    tmp_path, model_folder, single_process, batching, reference
):
    flat = rollout_batch(GROUPS)
    recorded = {name: array.copy() for name, array in flat.to_arrays().items()}
    laser = LASER | {"reference": reference}
    policy = {"old_logprobs": "rollout"}
    config = config_of(tmp_path, model_folder, laser=laser, batching=batching, policy=policy)
    result = Trainer(config, single_process, score_token_id=SCORE_TOKEN).train_step(flat, 1)
    config = config_of(tmp_path, model_folder, READOUTS[:1], laser=laser, batching=batching, policy=policy)
    without = Trainer(config, single_process, score_token_id=SCORE_TOKEN).train_step(flat, 1)

    expected, scores = plain_step(flat, result.advantages, reference=reference)
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    forced = result.readouts[1]
    assert forced.sample.tolist() == CUT and forced.of_responses
    assert forced.scores.tolist() == pytest.approx([scores[i] for i in CUT], rel=1e-5, abs=2e-6)
    # All else is as it is without the text: advantages, other losses, what is counted over tokens.
    torch.testing.assert_close(result.advantages, without.advantages)
    for name in set(without.metrics) - {"total_loss", "grad_norm", "rank_imbalance"}:
        assert result.metrics[name] == pytest.approx(
            without.metrics[name], rel=1e-5, abs=1e-6, nan_ok=True
        ), name
    for name, array in flat.to_arrays().items():  # recorded and dumped as generated
        np.testing.assert_array_equal(array, recorded[name])


def test_a_batch_without_a_response_that_was_cut_off_has_no_loss_there(
    tmp_path, model_folder, single_process
):
    flat = rollout_batch([[Response(5, True), Response(4, False)]])
    config = config_of(tmp_path, model_folder)
    result = Trainer(config, single_process, score_token_id=SCORE_TOKEN).train_step(flat, 1)
    assert "readout/forced/loss" not in result.metrics and np.isfinite(result.metrics["grad_norm"])
    assert len(result.readouts[1].scores) == 0


def test_the_loss_is_a_mean_over_the_updates_in_which_something_was_read(
    tmp_path, model_folder, single_process
):
    """lr 0: the update that reads something is the one that there is without the other."""
    cut = [[Response(5, True), Response(6, False, truncated=True)]]
    both = rollout_batch([*cut, [Response(4, True), Response(7, False)]])
    losses = []
    for flat, updates in ((rollout_batch(cut), 1), (both, 2)):
        config = config_of(tmp_path, model_folder, optimizer={"lr": 0.0}, policy={"minibatches": updates})
        result = Trainer(config, single_process, score_token_id=SCORE_TOKEN).train_step(flat, 1)
        losses.append(result.metrics["readout/forced/loss"])
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_metrics_of_the_readout_are_of_responses_and_not_of_quarters():
    samples = [
        SimpleNamespace(reward=r, generation=SimpleNamespace(response_ids=[5] * 4)) for r in (1.0, 0.0, 1.0)
    ]
    batch = SimpleNamespace(samples=lambda: iter(samples))
    read = SimpleNamespace(
        name="forced",
        of_responses=True,
        sample=np.array([1, 2]),
        offset=np.array([7, 7]),
        scores=torch.tensor([0.2, 0.9]),
    )
    found = readout_metrics(batch, [read])
    assert found["readout/forced/points"] == 2 and found["readout/forced/auroc"] == 1.0
    assert found["readout/forced/score_right_mean"] == pytest.approx(0.9)
    assert not [name for name in found if "quarter" in name]
    # a score that is not a number is why the step was skipped; recording it must not end the run
    read.scores = torch.tensor([float("nan"), 0.9])
    found = readout_metrics(batch, [read])
    assert found["readout/forced/points"] == 1 and found["readout/forced/score_right_mean"] == pytest.approx(
        0.9
    )
    read.scores = torch.full((2,), float("nan"))
    assert readout_metrics(batch, [read]) == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [{"position": {"forced": TEXT}, "advantages": "none"}],
            r"readouts\[0\].position: forced; the first readout is .*put another entry before it, such as \{\}",
        ),
        (
            [{}, {"position": {"forced": TEXT}, "advantages": "mix"}],
            r"readouts\[1\].advantages: mix with position forced; scores behind a forced text change no advantages",
        ),
        (
            [{}, {"position": {"forced": TEXT}, "target": "prefix_value"}],
            r"readouts\[1\].target: prefix_value with position forced; .*binary or \{group_shrunk: gamma\}",
        ),
        (
            [{}, {"position": {"forced": TEXT}}, {"position": {"forced": "w3"}}],
            r"readouts\[2\].position: forced 'w3', and laser.readouts\[1\] has 'w9 w7 <eos>'; .*the same text",
        ),
        ([{}, {"position": {"forced": ""}}], r"readouts\[1\].position: expected .*\{forced: text\}"),
        ([{}, {"position": {"forced": 7}}], r"readouts\[1\].position: expected .*\{forced: text\}"),
    ],
)
def test_what_cannot_be_forced_is_refused_with_its_place(tmp_path, entries, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, tmp_path / "model", entries)


def test_a_text_is_only_the_position_of_that_name(tmp_path):
    found = readouts(
        config_of(tmp_path, tmp_path / "model", [{}, {"position": {"delimiter": "\n\n"}}, READOUTS[1]])
    )
    assert [(one.delimiter, one.forced) for one in found] == [("", ""), ("\n\n", ""), ("", TEXT)]
    assert [one.of_responses for one in found] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "sections", "message"),
    [
        ("w9 <|249|>", {}, "'w9 <|249|>' has token id 249, which a readout reads"),
        ("w9 <|248|>", {}, "'w9 <|248|>' has token id 248, which a readout reads"),  # of another readout
        (" ", {}, "' ' is no token of the tokenizer"),
        (
            TEXT,
            {"rollout": {"max_new_tokens": 190}},
            r"data.max_prompt_tokens 64 + rollout.max_new_tokens 190 + 3 tokens of laser.readouts: position forced "
            "'w9 w7 <eos>' = 257 is more than the model's max_position_embeddings 256; use rollout.max_new_tokens 189",
        ),
        (
            TEXT,
            {"batching": {"tokens_per_micro_batch": 130}},
            "batching.tokens_per_micro_batch: 130 is less than data.max_prompt_tokens 64 + rollout.max_new_tokens 64 + "
            "3 tokens of laser.readouts: position forced 'w9 w7 <eos>' = 131; every sequence must fit: use 131 or more",
        ),
    ],
)
def test_a_text_that_cannot_stand_there_is_refused_before_the_run(
    tmp_path, model_folder, text, sections, message
):
    """By the dry run, by the checks before a start, and by the trainer itself."""
    entries = [{}, {"position": {"forced": text}}, {"tokens": [A, B], "loss": "bce"}]
    config = config_of(tmp_path, model_folder, entries, **sections)
    with pytest.raises(ConfigError) as refused:
        resolve_plan(config, 1)
    assert message in str(refused.value)
    (finding,) = forced_findings(config, looked_at(config, model_folder))
    assert finding.level == "error" and message in finding.text
    with pytest.raises(ConfigError) as refused:
        RunReadouts.of(config, SCORE_TOKEN)
    assert message in str(refused.value)


def looked_at(config, folder):
    found = ModelInputs(
        architecture=read_architecture(folder),
        vocabulary=read_vocabulary(folder),
        special=SimpleNamespace(stop_token_ids=(1,)),
    )
    readout_findings(config, found)  # keeps which tokens are read
    return found


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        (TEXT, "ok", "'w9 w7 <eos>' is 3 tokens, ['w9', 'w7', '<eos>']; behind a response that was cut off it ends "
         "at 131 tokens at most, and the model has 256 positions"),
        ("w9 nothing", "warning", "a part of 'w9 nothing' is unknown to the tokenizer"),
        ("w9 w7", "note", "'w9 w7' does not end with a token that ends a response ([1])"),
    ],
)  # fmt: skip
def test_what_a_text_is_as_tokens_is_said_before_the_run(tmp_path, model_folder, text, level, words):
    config = config_of(tmp_path, model_folder, [{}, {"position": {"forced": text}}])
    found = forced_findings(config, looked_at(config, model_folder))
    assert [one.level for one in found] == ["ok", *([] if level == "ok" else [level])]
    assert words in found[-1].text
    config = config_of(tmp_path, model_folder, [{}])
    assert forced_findings(config, looked_at(config, model_folder)) == []


def test_plan_and_trainer_count_the_same_tokens_and_without_a_tokenizer_the_plan_counts_bytes(
    tmp_path, model_folder
):
    config = config_of(tmp_path, model_folder)
    assert list(planned_ids(config)) == IDS == list(text_ids(load_tokenizer(model_folder, [TEXT]), TEXT))
    assert longest_trained(config) == 64 + 64 + 3
    plan, plain = resolve_plan(config, 1), resolve_plan(config_of(tmp_path, model_folder, [{}]), 1)
    assert plan.batch.tokens_per_rank == plain.batch.tokens_per_rank + 16 * 3
    assert [f.detail for f in plan.features if f.name == "forced text"] == [
        "'w9 w7 <eos>', 3 tokens behind responses that were cut off, read by forced, pair"
    ]
    assert "forced text" not in {f.name for f in plain.features}
    spoilt = (
        tmp_path / "spoilt"
    )  # a file may have been saved with padding and truncation, which trainers ignore
    shutil.copytree(model_folder, spoilt)
    tokenizer = Tokenizer.from_file(str(spoilt / "tokenizer.json"))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(spoilt / "tokenizer.json"))
    assert list(planned_ids(config_of(tmp_path, spoilt))) == IDS
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    assert longest_trained(config_of(tmp_path, bare)) == 64 + 64 + len(TEXT)
    assert longest_trained(config_of(tmp_path, bare, [{}])) == 64 + 64
