"""`bench prompts` in one process at toy size: what it counts and prints, and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from megatron_laser.cli import app


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "prompts", *arguments])


@pytest.mark.slow
def test_both_arms_are_timed_and_their_tokens_counted(tmp_path):
    file = tmp_path / "figures.json"
    result = bench(
        *("--length", "32:4", "--prompts", "2", "--samples", "3", "--rounds", "1", "--budget", "128"),
        *("--output", str(file)),
    )
    assert result.exit_code == 0, result.output
    train, generate = json.loads(file.read_text())["timed"]
    # 6 samples of 36 tokens; or what both prompts begin with (24), their further tokens (7 each), and for each sample
    # the prompt's last token and the response (5). All even: no padding.
    assert train["tokens"] == {"own": 216, "shared": 24 + 2 * 7 + 6 * 5}
    assert generate["tokens"] == {"own": 6 * 32, "shared": 24 + 2 * 8}
    for one in (train, generate):
        assert {arm: len(seconds) for arm, seconds in one["seconds"].items()} == {"own": 1, "shared": 1}
    assert "speed-up" in result.output and "216 to 68" in result.output


def test_lengths_that_do_not_fit_are_refused():
    assert "expected PROMPT:RESPONSE" in bench("--length", "32").output
    result = bench("--length", "600:10", "--length", "10:600", "--budget", "1000")
    assert result.exit_code == 2
    assert "have 1200 tokens" in " ".join(result.output.split())
