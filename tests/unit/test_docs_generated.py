"""docs/configuration.md says what the schema says."""

import sys
from pathlib import Path
from typing import Literal

import pytest
from helpers.source_tree import ROOT

from megatron_laser.config import key_paths
from megatron_laser.config.schema.fields import Count, DecayPair, FilePaths, Fraction, LogProb, Positive

sys.path.insert(0, str(ROOT / "tools"))
import generate_docs as tool


def test_the_configuration_page_is_up_to_date():
    current = tool.TARGET.read_text(encoding="utf-8") if tool.TARGET.exists() else ""
    assert current == tool.generate(), (
        f"the schema has changed since docs/configuration.md: run `{tool.COMMAND}`"
    )


def test_every_key_has_a_line_with_a_meaning():
    text = tool.generate()
    for section, keys in key_paths().items():
        part = text.split(f"\n## {section}\n")[1].split("\n## ")[0].split("\n### ")[0]
        for key in keys:
            (line,) = [line for line in part.splitlines() if line.startswith(f"| `{key}` |")]
            assert len(line.rsplit(" | ", 1)[1]) > 12, line


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Count, "integer >= 1"),
        (Positive, "number > 0"),
        (Positive | None, "number > 0 or null"),
        (Fraction, "number >= 0 and <= 1"),
        (LogProb | None, "number < 0 or null"),
        (Literal["a", "b"], "`a` or `b`"),
        (FilePaths, "path or a list of them"),
        (DecayPair, "[number >= 0 and < 1, number >= 0 and < 1]"),
        (Path | None, "path or null"),
        (bool, "true or false"),
    ],
)
def test_types_are_said_in_words(annotation, words):
    assert tool.describe_type(annotation) == words
