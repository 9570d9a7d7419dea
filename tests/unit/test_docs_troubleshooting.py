"""docs/troubleshooting.md quotes messages that the program still prints."""

import ast
import re

import pytest
from helpers.source_tree import ROOT, modules, tree

PAGE = ROOT / "docs" / "troubleshooting.md"
HOLE = "…"


def rows():
    """(message, cause, what to do) of every table's lines."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def text_of(node):
    """A string as written in the source, values replaced by the hole; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*[sdfrg]", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    return None


def messages():
    texts = {text_of(node) for file in modules().values() for node in ast.walk(tree(file))}
    return sorted(" ".join(text.split()) for text in texts if text)


def occurs(message, texts):
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split(HOLE)))
    return any(pattern.search(text) for text in texts)


def test_every_quoted_message_still_occurs_in_the_source():
    texts = messages()
    gone = [cells[0] for cells in rows() if not occurs(cells[0].strip("`"), texts)]
    assert not gone, f"docs/troubleshooting.md quotes messages that the source no longer has: {gone}"


def test_every_message_has_a_cause_and_something_to_do_and_stands_once():
    quoted = [cells[0] for cells in rows()]
    assert len(quoted) > 50
    assert len(set(quoted)) == len(quoted)
    for cells in rows():
        assert len(cells) == 3 and all(len(cell) > 5 for cell in cells), cells


def test_messages_of_the_first_hour_occur_in_the_source_or_the_scripts():
    scripts = [file for folder in ("tools", "examples/launch") for file in (ROOT / folder).rglob("*.sh")]
    tools = [text_of(node) for file in (ROOT / "tools").rglob("*.py") for node in ast.walk(tree(file))]
    texts = messages() + [" ".join(text.split()) for text in tools if text]
    texts += [" ".join(file.read_text(encoding="utf-8").split()) for file in scripts]
    page = (PAGE.parent / "first_cluster_hour.md").read_text(encoding="utf-8")
    heads = re.findall(r"^- (`[^`]+`(?:(?:, or|,) `[^`]+`)*)", page, re.MULTILINE)
    quoted = [message for head in heads for message in re.findall("`([^`]+)`", head)]
    assert len(quoted) > 30
    gone = [message for message in quoted if not occurs(message, texts)]
    assert not gone, f"docs/first_cluster_hour.md quotes messages that nothing prints any more: {gone}"


@pytest.mark.parametrize(
    "page", ["first_cluster_hour.md", "troubleshooting.md", "rollout.md", "observing.md"]
)
def test_every_setting_that_the_page_names_exists(page):
    from megatron_laser.config import key_paths

    sections = key_paths()
    text = (PAGE.parent / page).read_text(encoding="utf-8")
    text = re.sub(r"```console.*?```", "", text, flags=re.DOTALL)  # loggers have dotted names, too
    named = re.findall(r"\b(" + "|".join(sections) + r")\.((?:sglang\.)?[a-z_]+)\b", text)
    sections |= {name: (*keys, *(key.partition(".")[0] for key in keys)) for name, keys in sections.items()}
    no_key = ("md", "yaml")  # file names
    unknown = {f"{section}.{key}" for section, key in named if key not in (*no_key, *sections[section])}
    assert not unknown, f"docs/{page} names settings that do not exist: {sorted(unknown)}"


@pytest.mark.parametrize(
    "page",
    [
        *(
            "README.md",
            "docs/first_cluster_hour.md",
            "docs/rollout.md",
            "docs/scaling.md",
            "docs/troubleshooting.md",
        ),
        *(
            f"examples/{name}/README.md"
            for name in ("orz_7b", "octothinker_3b", "qwen2.5_7b", "qwen2.5_32b", "qwen3_4b_general")
        ),
    ],
)
def test_every_file_that_the_page_links_to_or_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    gone = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    named = re.findall(r"\b(?:examples|tools)/[\w./-]*\w", text)
    gone += [name for name in named if not (ROOT / name).exists()]
    assert not gone, f"{page} names files that do not exist: {gone}"


@pytest.mark.parametrize(
    ("message", "expected"),
    [("run.steps … is", True), ("took … s", True), ("took … minutes", False), ("was ... lost", False)],
)
def test_values_match_whatever_the_source_puts_there(message, expected):
    code = 'f"run.steps {steps} is small"\nlogger.info("took %.1f s")\n"was not" " lost"'
    texts = [text for node in ast.walk(ast.parse(code)) if (text := text_of(node))]
    assert occurs(message, texts) is expected
