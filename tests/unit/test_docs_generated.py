"""docs/configuration.md says what the schema says."""

import re
import sys
from pathlib import Path
from typing import Literal

import pytest
from helpers.documented import undocumented
from helpers.source_tree import ROOT

from megatron_laser.config import key_paths
from megatron_laser.config.schema.fields import Count, DecayPair, FilePaths, Fraction, LogProb, Positive
from megatron_laser.observability.alarms import RULES

sys.path.insert(0, str(ROOT / "tools"))
import generate_docs as tool


def test_the_configuration_page_is_up_to_date():
    current = tool.TARGET.read_text(encoding="utf-8") if tool.TARGET.exists() else ""
    assert current == tool.generate(), (
        f"the schema has changed since docs/configuration.md: run `{tool.COMMAND}`"
    )


def test_the_table_of_alarms_is_up_to_date():
    page = tool.ALARMS.read_text(encoding="utf-8")
    assert page == tool.with_alarms(page), (
        f"alarms have changed since docs/observing.md: run `{tool.COMMAND}`"
    )
    for rule in RULES:
        assert f"| `{rule.name}` " in page


def anchors(page):
    """What GitHub makes of the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_place_to_look_is_there(rule):
    """The metrics have a line in docs/metrics.md, the page has the part, and settings that are named exist."""
    evaluations = [name for name in rule.metrics if name.startswith("eval/")]
    assert set(undocumented(rule.metrics)) <= {name for name in rule.metrics if name.startswith("eval/")}
    assert set(undocumented(evaluations)) == set()
    file, _, anchor = rule.page.partition("#")
    assert not anchor or anchor in anchors(ROOT / "docs" / file)
    sections = key_paths()
    named = re.findall(r"\b(" + "|".join(sections) + r")\.((?:sglang\.)?[a-z_]+)\b", rule.means)
    assert [f"{section}.{key}" for section, key in named if key not in sections[section]] == []


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
