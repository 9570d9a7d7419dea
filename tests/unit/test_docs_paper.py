"""docs/paper.md: every row says how or why not; its commands parse, and its settings and files are there."""

import re
import shlex

import pytest
import typer
from helpers.source_tree import ROOT

from megatron_laser.cli import app
from megatron_laser.config import key_paths
from megatron_laser.evaluation.benchmarks.settings import BenchmarkSettings

PAGE = ROOT / "docs" / "paper.md"
TEXT = PAGE.read_text(encoding="utf-8").replace("\\|", "\0")


def rows():
    """(what, how, needs) of every row but heads."""
    found = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| ")]
    return [
        tuple(cell.strip() for cell in row) for row in found if row[0].strip() not in ("of the paper", "---")
    ]


def spans():
    return [span.replace("\0", "|") for span in re.findall(r"`([^`\n]+)`", TEXT)]


COMMANDS = sorted({span for span in spans() if span.startswith("megatron-laser ")})


def parse(line):
    """Parse a command line as the program does, without running it."""
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    context = typer.Context(command)
    while hasattr(command, "get_command"):
        name, command = words[0], command.get_command(context, words[0])
        assert command is not None, f"no command {name}"
        words = words[1:]
    return command.make_context(line, words).params


def test_every_row_has_three_cells_and_says_how_or_why_not():
    assert len(rows()) > 35
    for row in rows():
        assert len(row) == 3, row
        what, how, _ = row
        assert what and (
            "`" in how or any(words in how for words in ("nothing to run", "Not here:", "the same command"))
        ), row


@pytest.mark.parametrize("line", [line for line in COMMANDS if " " in line.removeprefix("megatron-laser ")])
def test_its_commands_parse(line):
    settings = parse(line).get("overrides") or []
    known = key_paths()
    for setting in settings:
        section, _, key = setting.partition("=")[0].partition(".")
        assert key in known.get(section, BenchmarkSettings.model_fields), setting


def test_a_command_that_does_not_parse_is_seen():
    for words in ("eval MODEL x.yaml --scores y", "verify MODEL", "paper x"):
        with pytest.raises((Exception, SystemExit), match=r"[Nn]o such option|[Mm]issing|no command"):
            parse(f"megatron-laser {words}")


def test_its_settings_exist():
    known = key_paths()
    named = re.findall(rf"`((?:{'|'.join(known)})\.\w+)", TEXT)
    assert len(named) > 12
    gone = {name for name in named if name.partition(".")[2] not in (*known[name.partition(".")[0]], "py")}
    assert not gone, f"docs/paper.md names settings that are not there: {gone}"


def test_its_files_and_links_exist():
    files = set(re.findall(r"(?:examples|docs|tools)/[\w./-]+", " ".join(spans())))
    assert len(files) > 8
    gone = {file for file in files if not (ROOT / file).exists()}
    assert not gone, f"docs/paper.md names files that are not there: {gone}"
    headings = re.compile(r"^#+ (.+)$", re.MULTILINE)
    for path, anchor in re.findall(r"\]\(([\w./]+)(?:#([\w-]+))?\)", TEXT):
        assert (PAGE.parent / path).exists(), path
        if anchor:
            titles = headings.findall((PAGE.parent / path).read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
