"""A whole run whose responses come from a real SGLang server, with weights broadcast to it after each step."""

import json

import pytest
from helpers.ranks import train_on_ranks

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize(
    "overrides",
    [
        ["laser.score_source=server", "policy.old_logprobs=on_policy"],
        ["rollout.ahead=1", "policy.importance_cap=2.0", "rollout.oversample=1.5"],
    ],
    ids=["on-policy, the server scores", "ahead and oversampled"],
)
def test_a_run_is_fed_by_a_server(sglang_server, tmp_path, overrides):
    folder = tmp_path / "out"
    train_on_ranks(
        sglang_server.run_file,
        "rollout.engine=sglang",
        f"rollout.sglang.endpoints={sglang_server.endpoints}",
        "rollout.sglang.device=cpu",
        f"run.output_dir={folder}",
        *overrides,
        timeout=200,
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "policy_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    on_policy = "rollout.ahead=1" not in overrides
    for line in steps:
        if on_policy:
            assert line["logprob_diff_max"] < 1e-4
            assert line["staleness_max"] == 0
        else:
            assert line["staleness_max"] <= 2
    if on_policy:
        differences = [line["zc_logprob_diff_max"] for line in steps if line["scored_fraction"]]
        assert differences and max(differences) < 1e-4  # the server reads the score where it is trained
    else:
        assert max(line["staleness_max"] for line in steps) >= 1
    # What the server says of itself; a rollout that lasts less than a twentieth of a second is not looked at. Responses
    # are so short that it may not have said of any that it runs: test_shared_server.py asks for longer ones.
    said = [line for line in steps if "servers/running_mean" in line]
    assert said and max(line["servers/utilisation"] for line in said) > 0
    for line in said:
        assert 0 <= line["servers/running_mean"] <= 64 and 0 <= line["servers/queued_mean"] <= 64
        assert 0 <= line["servers/kv_usage_mean"] <= 1 and 0 <= line["servers/utilisation"] <= 1
        assert 0 <= line["idle/servers"] <= 1
    # While the last step trains, nothing is generated ahead any more.
    generating = [line for line in steps if "time/generate" in line]
    assert len(generating) >= 3 and all(line["rate/tokens_per_second_server_gpu"] > 0 for line in generating)
    assert min(line["idle/servers"] for line in generating) < 0.9
