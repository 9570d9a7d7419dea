"""What `bench step` and `bench client` print and write: figures of every arm, and where they come from."""

import datetime
import json

import pytest
import torch
from helpers.faulty_server import FaultyServer, open_engine
from helpers.tiny_run import write_tiny_run
from typer.testing import CliRunner

from megatron_laser.benchmarks import client
from megatron_laser.benchmarks.result import aligned, command_line
from megatron_laser.cli import app

SIZES = dict(rounds=2, prompts=2, samples=2, response_length=4, hidden=32, layers=1, vocabulary=64)


def invoke(monkeypatch, *arguments):
    """(what is printed, figures) of `bench ...`, as the command of a user."""
    command = ["bench", *map(str, arguments)]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/megatron-laser", *command])
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done.output, json.loads(arguments[-1].read_text())


def check_provenance(found, *arguments):
    assert found["command"] == " ".join(["megatron-laser", "bench", *map(str, arguments)])
    assert found["date"] == datetime.date.today().isoformat()
    assert found["versions"]["torch"] == torch.__version__ and "megatron-core" in found["versions"]
    assert "CPU cores" in found["machine"] and found["threads"] == torch.get_num_threads()


def test_the_step_benchmark_prints_every_trainer_and_writes_where_its_figures_come_from(
    monkeypatch, tmp_path
):
    options = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", value)]
    arguments = ["step", *options, "--output", tmp_path / "new" / "step.json"]
    said, figures = invoke(monkeypatch, *arguments)
    check_provenance(figures["provenance"], *arguments)
    assert figures["tokens_per_step"] == 2 * 2 * (32 + 4)
    assert {name: len(seconds) for name, seconds in figures["seconds"].items()} == dict.fromkeys(
        ("GRPO", "LaSeR", "LaSeR, server scores"), 2
    )
    assert "144 tokens, 2 interleaved rounds" in said and "over GRPO" in said and "peak MiB" in said
    assert "of LaSeR's train step" in said


def test_the_client_benchmark_counts_the_tokens_of_every_arm(monkeypatch, tmp_path):
    server = FaultyServer()
    sglang = {"urls": [server.url], "device": "cpu"}
    run = write_tiny_run(tmp_path, rollout={"engine": "sglang", "sglang": sglang})
    monkeypatch.setattr(client, "open_engine", lambda config: open_engine(server))
    arguments = ["client", run, "--rounds", 2, "--output", tmp_path / "client.json"]
    try:
        said, figures = invoke(monkeypatch, *arguments)
    finally:
        server.stop()
    check_provenance(figures["provenance"], *arguments)
    assert figures["provenance"]["versions"]["sglang"] == "0.5.23"
    assert figures["servers"] == 1 and figures["requests"] == 16
    assert 0 < figures["tokens"] <= 16 * 4
    assert all(len(rates) == 2 and min(rates) > 0 for rates in figures["tokens_per_second"].values())
    assert "SGLang 0.5.23" in said and "bare asyncio loop" in said and "scores cost" in said


def test_columns_are_as_wide_as_their_longest_cell():
    assert aligned([["", "ms", "note"], ["one", "10.0", ""], ["a", "9", "x"]]) == [
        "       ms  note",
        "one  10.0",
        "a       9     x",
    ]


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/x/bin/megatron-laser", "bench", "step"], "megatron-laser bench step"),
        (["/x/megatron_laser/__main__.py", "bench", "a b"], "python -m megatron_laser bench 'a b'"),
        (["tools/peer_trl.py", "--rounds", "2"], "python tools/peer_trl.py --rounds 2"),
        (["/elsewhere/tool.py"], "python tool.py"),
    ],
)
def test_a_command_is_written_as_one_types_it(monkeypatch, tmp_path, argv, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", argv)
    assert command_line() == command
