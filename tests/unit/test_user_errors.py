"""What a user can put right ends in one message and exit status 2, for every command; a crash stays one."""

import errno
import json
from pathlib import Path

import pytest
import typer
from helpers.models import save_tiny_model, save_word_tokenizer
from typer.testing import CliRunner

from megatron_laser.cli import app
from megatron_laser.cli import errors as cli_errors
from megatron_laser.cli.errors import Commands, user_message
from megatron_laser.config import ConfigError
from megatron_laser.distributed.rendezvous import RendezvousError
from megatron_laser.errors import UserError
from megatron_laser.rollout.servers import ServeError
from megatron_laser.trainer.bad_steps import BadStepsError
from megatron_laser.trainer.trainer import MismatchError

WORDS = ["<unk>", "<eos>", "what", "is", "1", "<|score|>"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_message(done, *words):
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert done.output.startswith("error: ") and "Traceback" not in done.output
    for word in words:
        assert word in done.output, done.output


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "model"
    save_tiny_model(folder, "llama3-rope", vocab_size=len(WORDS))
    save_word_tokenizer(folder, WORDS)
    return folder


@pytest.fixture
def model(base, tmp_path):
    """A copy that a test may break."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def run(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "what is 1", "answer": "1"}))
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: model, dtype: float32, vocab_multiple: 2}\n"
        "data: {train: train.jsonl, prompt_suffix: '', apply_chat_template: false, max_prompt_tokens: 8}\n"
        "rollout: {prompts_per_step: 1, samples_per_prompt: 2, max_new_tokens: 8}\n"
        "laser: {score_token: '<|score|>', ref_logprob: -6.0, beta: 0.5}\n"
        "batching: {tokens_per_micro_batch: 64}\n"
        "run: {steps: 1, output_dir: run}\n"
    )
    return file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "cannot be read: 'utf-8' codec can't decode"),
        (b"a: \0", "not valid YAML: special characters are not allowed"),
        (b"a: " + b"[" * 600, "nested too deeply"),
        (b"a: [", "not valid YAML"),
        (b"a: !!python/object:os.system x", "not valid YAML"),
        (b"? [a]\n: 1", "not valid YAML"),
        (b"- a", "expected sections"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--dry-run"], ["check"]])
def test_files_that_are_no_yaml(tmp_path, content, words, command):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert_one_message(invoke(*command, file), str(file), words)


def test_a_folder_where_a_file_is_expected(tmp_path, model):
    assert_one_message(invoke("train", tmp_path), str(tmp_path), "Is a directory")
    assert_one_message(invoke("report", tmp_path / "nothing"), "metrics.jsonl does not exist")
    assert_one_message(invoke("convert", tmp_path, tmp_path / "out"), "is neither a checkpoint")


@pytest.mark.parametrize("seed", ["-1", str(2**63), "1.5", "x"])
@pytest.mark.parametrize("key", ["run.seed", "evaluation.seed"])
def test_seeds_that_no_generator_takes(run, model, key, seed):
    assert_one_message(invoke("train", run, "--dry-run", f"{key}={seed}"), f"{key}: expected", seed)


def test_the_largest_seed_is_one(run, model):
    assert invoke("train", run, "--dry-run", f"run.seed={2**63 - 1}").exit_code == 0


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]"])
def test_damaged_files_of_a_model_folder(run, model, file, content):
    (model / file).write_bytes(content)
    done = invoke("check", run)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert "  error    " in done.output and "would not start" in done.output


def test_an_override_that_is_no_yaml_is_one_line(run, model):
    done = invoke("train", run, "--dry-run", "run.name=a\0b")
    assert_one_message(done, "special characters are not allowed")
    assert len(done.output.splitlines()) == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WORLD_SIZE", "two"), ("RANK", "x"), ("OMP_NUM_THREADS", "many"), ("WORLD_SIZE", "2")],
)
def test_numbers_of_the_environment(run, model, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert_one_message(invoke("train", run), f"environment variable {variable}={value}")


def test_a_saved_summary_or_configuration_that_cannot_be_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5}\n')
    (tmp_path / "config.yaml").write_text("run: [")
    assert_one_message(invoke("report", tmp_path), "config.yaml", "not valid YAML")
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "test_step_1.json").write_text("{")
    assert_one_message(invoke("report", tmp_path), "test_step_1.json", "cannot be read as JSON")


@pytest.mark.parametrize("kind", [BadStepsError, MismatchError, ServeError, RendezvousError])
def test_errors_that_are_the_users_to_mend(kind):
    assert issubclass(kind, UserError) and user_message(kind("what to do")) == "what to do"


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/data/x"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "/data/x"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/data/x"),
        FileExistsError(errno.EEXIST, "File exists", "/data/x"),
        OSError(errno.ENOSPC, "No space left on device", "/data/x"),
        OSError(errno.ENAMETOOLONG, "File name too long", "/data/x"),
    ],
)
def test_what_the_system_says_of_a_users_path(error):
    assert user_message(error) == f"/data/x: {error.strerror}"


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), RuntimeError("x"), OSError(errno.EIO, "I/O", "/x")]
)
def test_a_crash_stays_a_crash(error):
    assert user_message(error) == ""


@pytest.fixture
def commands():
    """A command line with a command of its own and one in a group."""
    raised = []
    app = typer.Typer(cls=Commands)
    group = typer.Typer()
    app.add_typer(group, name="group")

    def fail() -> None:
        raise raised[0]

    app.command("one")(fail)
    app.command("train")(fail)
    app.command("other")(lambda: None)
    group.command("inner")(fail)
    group.command("other")(lambda: None)
    return app, raised


@pytest.mark.parametrize("path", [["one"], ["group", "inner"]])
def test_every_command_is_covered_whether_it_thinks_of_it_or_not(commands, path):
    app, raised = commands
    raised[:] = [ConfigError(["a: wrong"])]
    assert_one_message(CliRunner().invoke(app, path), "a: wrong")
    raised[:] = [KeyError("crash")]
    done = CliRunner().invoke(app, path)
    assert done.exit_code == 1 and isinstance(done.exception, KeyError)


def test_other_ranks_leave_the_word_to_rank_0(commands, monkeypatch):
    app, raised = commands
    raised[:] = [ConfigError(["a: wrong"])]
    slept = []
    monkeypatch.setattr(cli_errors.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = CliRunner().invoke(app, ["train"])
    assert done.exit_code == 2 and done.output == "" and slept == [3.0]
    # Commands of one process speak, whatever they have inherited; and a rank without a run is no other rank.
    assert_one_message(CliRunner().invoke(app, ["one"]), "a: wrong")
    assert_one_message(CliRunner().invoke(app, ["group", "inner"]), "a: wrong")
    monkeypatch.delenv("WORLD_SIZE")
    assert_one_message(CliRunner().invoke(app, ["train"]), "a: wrong")
    assert slept == [3.0]


@pytest.mark.parametrize("arguments", [["check"], ["train"], ["eval", "nope"]])
def test_an_inherited_rank_hides_no_error(run, monkeypatch, arguments):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert_one_message(invoke(*arguments, run.with_name("nope.yaml")), "nope")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_not_said_of_the_runs_disk():
    full = open("/dev/full", "w")  # noqa: SIM115 - closing it fails as well
    with pytest.raises(OSError) as caught:
        typer.echo("text", file=full)
    with pytest.raises(OSError):
        full.close()
    assert user_message(caught.value) == "what the command prints cannot be written: No space left on device"
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as full:
        full.write("text")
        full.flush()
    assert user_message(caught.value) == "[Errno 28] No space left on device"


def test_a_rank_without_a_world_is_named(run, model, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    assert_one_message(invoke("train", run), "environment variables RANK=5 and WORLD_SIZE=1")


def test_help_names_every_command():
    done = invoke("--help")
    assert done.exit_code == 0
    for command in (
        "train",
        "check",
        "report",
        "replay",
        "convert",
        "serve",
        "env",
        "eval",
        "score",
        "calibrate",
        "bench",
    ):
        assert command in done.output
        assert invoke(command, "--help").exit_code == 0


def test_ctrl_c_is_one_line_that_says_what_is_kept_and_exit_status_130(monkeypatch, tmp_path):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_laser.cli.conversion.convert", interrupted)
    result = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "target")])
    assert result.exit_code == 130
    assert result.output.strip() == "interrupted (SIGINT): nothing was written: the target is as it was"
