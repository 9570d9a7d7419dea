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

from megatron_laser.config.model_folder.special_tokens import SpecialTokens  # noqa: E402
from megatron_laser.run.preflight.model import ModelInputs  # noqa: E402
from megatron_laser.run.preflight.objectives import objective_findings, readout_findings  # noqa: E402
from megatron_laser.trainer.trainer import Trainer  # noqa: E402
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


def test_what_a_function_returns_is_looked_at(tmp_path, model_folder, single_process):
    file = tmp_path / "mine.py"
    file.write_text("def one(batch):\n    return batch.rewards.mean()\n")
    config = run_config(tmp_path, model_folder, f"policy.advantage={file}:one")
    trainer = Trainer(config, single_process, score_token_id=SCORE_TOKEN)
    with pytest.raises(
        UserFunctionError, match=r"policy.advantage: the function returned .* 5 finite advantages"
    ):
        trainer.train_step(rollout_batch(GROUPS), 1)


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
