"""examples/objectives.py: a stranger's loss, advantage and effect of a score train, in under 40 lines."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.models import tiny_model
from helpers.rollouts import Response, rollout_batch
from helpers.runs import SCORE_TOKEN, run_config
from helpers.source_tree import ROOT

from megatron_laser.model import platform

platform.install()

from megatron_laser.algorithms.objectives import PolicyRows, RowLosses  # noqa: E402
from megatron_laser.config.model_folder.special_tokens import SpecialTokens  # noqa: E402
from megatron_laser.run.preflight.model import ModelInputs  # noqa: E402
from megatron_laser.run.preflight.objectives import objective_findings, readout_findings  # noqa: E402
from megatron_laser.trainer.bad_steps import BadStepsError  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402
from megatron_laser.trainer.user_objectives import checked_advantages, checked_policy_loss  # noqa: E402
from megatron_laser.user_functions import UserFunctionError  # noqa: E402

FILE = ROOT / "examples" / "objectives.py"
GROUPS = [
    [Response(5, True), Response(7, False), Response(3, False)],
    [Response(4, True), Response(6, False)],
]
OWN = (
    f"policy.loss={FILE}:soft_clip",
    "policy.loss_options={width: 0.3}",
    f"policy.advantage={FILE}:ranked",
    f"laser.readouts=[{{advantages: '{FILE}:doubt'}}]",
    "laser.reasoning_warmup_steps=0",
    "laser.self_reward_warmup_steps=0",
    "policy.old_logprobs=rollout",
)


@pytest.fixture
def model_folder(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_example_is_short_and_trains_as_it_says(tmp_path, model_folder, single_process):
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 40
    flat = rollout_batch(GROUPS)
    config = run_config(tmp_path, model_folder, *OWN)
    result = Trainer(config, single_process, score_token_id=SCORE_TOKEN).train_step(flat, 1)
    expected = torch.tensor([1.0, -0.5, -0.5, 1.0, -1.0])  # better than all others; worse than one of two
    sure = (torch.from_numpy(flat.rewards) - result.scores.clamp(0, 1)).abs() < 0.1
    assert sure.any() or not sure.all()
    torch.testing.assert_close(result.advantages, torch.where(sure, 0.5, 1.0) * expected)

    model = tiny_model("qwen2")
    loss = 0.0
    for i, advantage in enumerate(result.advantages.tolist()):
        prompt, response = flat.prompt_ids(i).tolist(), flat.response_ids(i).tolist()
        logits = model(torch.tensor([prompt + response])).logits[0].double()
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        for t, (token, row) in enumerate(zip(response, rows)):
            ratio = math.exp(float(row[token]) - float(flat.rollout_logprobs[flat.response_offsets[i] + t]))
            loss -= advantage * 0.3 * math.tanh((ratio - 1) / 0.3)
    assert result.metrics["policy_loss"] == pytest.approx(
        loss / len(flat.rollout_logprobs), rel=1e-4, abs=1e-6
    )


MINE = """
import torch

def one(batch):
    return batch.rewards.mean()

def by_score(batch):
    assert batch.scores[batch.scored].isfinite().all(), "it was shown a score that is not finite"
    return batch.scores.nan_to_num() - 0.5

@torch.no_grad()
def dead(rows):
    return -rows.advantages * rows.logprobs

def wild(rows):
    return rows.logprobs * torch.nan
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_what_a_function_returns_is_looked_at(tmp_path, model_folder, single_process, mine):
    config = run_config(tmp_path, model_folder, f"policy.advantage={mine}:one")
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    with pytest.raises(
        UserFunctionError,
        match=rf"policy.advantage: {mine}:one returned a tensor of shape \(\); expected 5 finite advantages",
    ):
        trainer.train_step(rollout_batch(GROUPS), 1)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "returned None; expected 3 finite"),
        ([1.0, 2.0, 3.0], "returned a value of type list; expected 3 finite"),
        (torch.zeros(2), r"returned a tensor of shape \(2,\); expected 3 finite"),
        (
            torch.tensor([0.0, math.inf, math.nan]),
            "returned inf for sample 1, and 2 of 3 that are not finite",
        ),
    ],
)
def test_advantages_that_are_none_are_named_with_setting_and_function(found, message):
    with pytest.raises(UserFunctionError, match=f"policy.advantage: a.py:f {message}"):
        checked_advantages("policy.advantage", "a.py:f", found, torch.zeros(3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda rows: None, "None; expected a tensor with one loss for each of 3 rows"),
        (
            lambda rows: rows.logprobs.detach().numpy(),
            "a value of type ndarray; expected a tensor with one loss for each of 3",
        ),
        (lambda rows: rows.logprobs.sum(), r"a tensor of shape \(\); expected"),
        (lambda rows: rows.logprobs[:2], r"a tensor of shape \(2,\); expected"),
        (lambda rows: (rows.logprobs,) * 3, "a tuple of 3; expected"),
        (lambda rows: RowLosses(rows.logprobs, torch.tensor(True)), r"clipped: a tensor of shape \(\)"),
        (lambda rows: (rows.logprobs, True), "clipped: a value of type bool"),
        (lambda rows: torch.ones(3, dtype=torch.int64), "a loss of torch.int64; expected floating-point"),
        (lambda rows: -rows.advantages * rows.logprobs.detach(), r"a loss without a gradient, .*no_grad\(\)"),
        (
            lambda rows: torch.from_numpy(rows.logprobs.detach().numpy() * 2.0),
            "a loss without a gradient, of which nothing would be learned",
        ),
    ],
)
def test_a_policy_loss_that_is_none_is_named_with_its_function(function, message):
    x = torch.full((3,), -1.0, requires_grad=True)
    with pytest.raises(UserFunctionError, match=f"policy.loss: a.py:f returned {message}"):
        checked_policy_loss("a.py:f", function)(PolicyRows(x, x.detach(), torch.ones(3)))


def test_a_policy_loss_of_no_rows_or_without_autograd_needs_no_gradient():
    for rows, grad in ((0, True), (3, False)):
        x = torch.full((rows,), -1.0, requires_grad=grad)
        found = checked_policy_loss("a.py:f", lambda rows: torch.zeros(len(rows.logprobs)))(
            PolicyRows(x, x.detach(), torch.ones(rows))
        )
        assert found.shape == (rows,)


def test_a_policy_loss_without_a_gradient_ends_the_step_before_the_backward(
    tmp_path, model_folder, single_process, mine
):
    config = run_config(tmp_path, model_folder, f"policy.loss={mine}:dead", *OWN[4:])
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    with pytest.raises(
        UserFunctionError, match=f"policy.loss: {mine}:dead returned a loss without a gradient"
    ):
        trainer.train_step(rollout_batch(GROUPS), 1)


def test_a_policy_loss_that_is_not_finite_is_a_bad_step_that_names_the_function(
    tmp_path, model_folder, single_process, mine
):
    config = run_config(tmp_path, model_folder, f"policy.loss={mine}:wild", *OWN[4:], "run.max_bad_steps=2")
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    weights = {name: tensor.clone() for name, tensor in trainer.weight_stream()}
    result = trainer.train_step(rollout_batch(GROUPS), 1)
    assert result.updates[0].bad[:1] == ("policy_loss",) and result.metrics["bad_steps"] == 1.0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.weight_stream())
    with pytest.raises(BadStepsError, match=f"rewards and log-probs, at policy.loss {mine}:wild$"):
        trainer.train_step(rollout_batch(GROUPS), 2)


@pytest.mark.parametrize("readout", [False, True], ids=["estimator", "effect of a readout"])
def test_a_score_that_is_not_finite_skips_the_step_before_a_function_sees_it(
    tmp_path, model_folder, single_process, mine, readout
):
    own = f"laser.readouts=[{{advantages: '{mine}:by_score'}}]" if readout else "laser.tau=0"
    overrides = [own, *OWN[4:], "laser.score_source=server"]
    overrides += [] if readout else [f"policy.advantage={mine}:by_score"]
    trainer = Trainer(
        run_config(tmp_path, model_folder, *overrides), single_process, score_token_id=SCORE_TOKEN
    )
    flat = rollout_batch(GROUPS)
    flat.zc_logprobs[:] = [-6.0, -5.0, math.nan, -4.0, -6.0]
    result = trainer.train_step(flat, 1)
    assert [update.bad for update in result.updates] == [("zc_logprob",)]
    assert result.metrics["bad_steps"] == 1.0
    flat.zc_logprobs[2] = -7.0
    result = trainer.train_step(flat, 2)
    assert result.updates[0].bad == ()
    # beta (log-prob - c_ref) - 1/2
    assert result.advantages.tolist() == pytest.approx([-0.5, -0.1, -0.9, 0.3, -0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.loss=no.py:loss"], "policy.loss: .*there is no file"),
        (
            [f"policy.advantage={FILE}:rank"],
            "policy.advantage: .*has no function 'rank'; its functions: doubt, ranked",
        ),
        (
            [f"policy.loss={FILE}:soft_clip", "policy.loss_options={wide: 1}"],
            "soft_clip takes no option 'wide'",
        ),
        (["laser.readouts=[{advantages: 'no.py:x'}]"], r"laser.readouts\[0\].advantages: .*there is no file"),
    ],
)
def test_what_cannot_be_called_is_found_before_anything_is_built(tmp_path, model_folder, overrides, message):
    (finding,) = objective_findings(run_config(tmp_path, model_folder, *overrides))
    assert finding.level == "error" and re.search(message, finding.text)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("[7, 1]", " 1 is id 1, which also ends a response"),
        ("[7, 200]", ": token id 200 is not in the model's vocabulary; expected 0 to 89"),
        ("[7, '<|yes|>']", r" '<\|yes\|>' has no id in .*: the model folder has no tokenizer files"),
    ],
)
def test_a_readouts_tokens_are_the_models_and_end_no_response(tmp_path, model_folder, tokens, message):
    config = run_config(tmp_path, model_folder, f"laser.readouts=[{{tokens: {tokens}, score: pair_sigmoid}}]")
    model = ModelInputs(architecture=SimpleNamespace(vocab_size=90), special=SpecialTokens((1,), None))
    (finding,) = [item for item in readout_findings(config, model) if item.level == "error"]
    assert re.search(r"laser.readouts\[0\].tokens" + message, finding.text)
