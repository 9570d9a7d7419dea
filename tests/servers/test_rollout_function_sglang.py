"""A whole run whose samples a function makes, turn by turn, through a real SGLang server."""

import json

import pytest
from helpers.tiny_run import end_session, start_run

pytestmark = [pytest.mark.sglang, pytest.mark.long]

TALK = """
from megatron_laser.rollout.function import Conversation

async def talk(engine, prompt, sampling):
    talk = Conversation(prompt, sampling)
    turn = await engine.generate(talk.ids, max_new_tokens=3, stop_token_ids=engine.encode("+"))
    talk.sampled(turn)
    if turn.ids[-1] in engine.stop_token_ids:
        return talk
    talk.environment(engine.encode("7 + 8"))
    talk.sampled(await engine.generate(talk.ids))
    return talk
"""


def test_turns_through_a_server_are_what_the_trainer_computes(sglang_server, tmp_path):
    (tmp_path / "env.py").write_text(TALK)
    process = start_run(
        sglang_server.run_file,
        "rollout.engine=sglang",
        f"rollout.sglang.endpoints={sglang_server.endpoints}",
        "rollout.sglang.device=cpu",
        f"rollout.function={tmp_path}/env.py:talk",
        "laser.score_source=server",
        "policy.old_logprobs=on_policy",
        "run.steps=3",
        f"run.output_dir={tmp_path}/out",
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        end_session(process)
    assert process.returncode == 0, output[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "policy_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["logprob_diff_max"] < 1e-4
        assert line["staleness_max"] == 0
        assert 0.1 < line["environment_tokens_fraction"] < 0.6
        assert line["function_failed_error"] == line["function_failed_invalid"] == 0
    differences = [line["zc_logprob_diff_max"] for line in steps if line["scored_fraction"]]
    assert differences and max(differences) < 1e-4  # behind several turns, too
