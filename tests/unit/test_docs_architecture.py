"""The files, folders, names and layers that docs/architecture.md, CONTRIBUTING.md and README.md tell of are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from helpers.source_tree import PACKAGE, ROOT, modules, tree
from test_import_rules import LAYERS

PAGE = "docs/architecture.md"
FROM_ROOT = ("docs/", "examples/", "tests/", "tools/")
FILES = "py|md|yaml|sh|txt|toml|cu|svg|json"


def section(page: str, heading: str) -> str:
    """A page's text under one heading of the second level."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def spans(text: str) -> list[str]:
    """What stands in backticks, blocks of code aside."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def first_cells(text: str) -> list[list[str]]:
    """The spans in the first cell of every row of the text's tables."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return [found for row in rows if (found := spans(row))]


def is_path(span: str) -> bool:
    return re.fullmatch(rf"[\w./-]+/|[\w./-]+\.({FILES})(:[\w.]+)?", span) is not None


def missing(span: str) -> str | None:
    """What a path, with or without a name in it, names in vain."""
    path, _, name = span.partition(":")
    inside = path in ("README.md", "CONTRIBUTING.md") or path.startswith((*FROM_ROOT, PACKAGE))
    places = [ROOT / path] if inside else [ROOT / PACKAGE / path, ROOT / path]
    file = next((place for place in places if place.exists()), None)
    if file is None or path.endswith("/") != file.is_dir():
        return f"{span}: no such {'folder' if path.endswith('/') else 'file'}"
    return f"{span}: no such name in the file" if name and not defines(file, name) else None


@cache
def defines(file: Path, name: str) -> bool:
    """Whether `name` (NAME or CLASS.NAME) is a function, class, method, field or constant at the file's top level."""
    body = tree(file).body
    for part in name.split("."):
        found = next((node for node in body if part in names_of(node)), None)
        if found is None:
            return False
        body = found.body if isinstance(found, ast.ClassDef) else []
    return True


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param((ROOT / PAGE).read_text(encoding="utf-8"), id=PAGE),
        pytest.param((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), id="CONTRIBUTING.md"),
        pytest.param(section("README.md", "Reading the code"), id="README.md"),
    ],
)
def test_every_file_folder_and_function_that_the_page_names_is_there(text: str) -> None:
    named = [span for span in spans(text) if is_path(span)]
    assert len(named) > 5
    gone = [problem for span in named if (problem := missing(span))]
    assert not gone, f"correct the page (the test's name says which) where it names {gone}"


def test_every_other_name_on_the_page_occurs_in_the_source() -> None:
    source = "\n".join(file.read_text(encoding="utf-8") for file in modules().values())
    words = set(re.findall(r"\w+", source)) | {"serve", "bench", "convert", "trainer"}
    names = {span for span in spans((ROOT / PAGE).read_text(encoding="utf-8")) if re.fullmatch(r"\w+", span)}
    assert names - words == set(), f"{PAGE} names what no source file has"


def test_every_setting_on_the_page_exists() -> None:
    from megatron_laser.config import key_paths

    sections = {
        name: (*keys, *(key.partition(".")[0] for key in keys), "py") for name, keys in key_paths().items()
    }
    named = re.findall(rf"`({'|'.join(sections)})\.(\w+)", (ROOT / PAGE).read_text(encoding="utf-8"))
    assert len(named) > 5
    assert [f"{name}.{key}" for name, key in named if key not in sections[name]] == []


@pytest.mark.parametrize(
    "page", sorted({path.name for path in (ROOT / "docs").glob("*.md")} - {Path(PAGE).name})
)
def test_modules_that_a_page_of_docs_names_are_there(page: str) -> None:
    """Pages of one folder name its modules from there: `triton/engine.py` on the page of the kernels."""
    named = [span for span in spans((ROOT / "docs" / page).read_text(encoding="utf-8")) if is_path(span)]
    ours = {path for span in named if (path := span.partition(":")[0]).endswith(".py") and "/" in path}
    gone = [
        path
        for path in sorted(ours - {"path/to/file.py"})
        if missing(path) and not any(str(file).endswith(f"/{path}") for file in modules().values())
    ]
    assert not gone, f"docs/{page} names modules that are not there: {gone}"


def test_the_picture_names_modules_that_are_there() -> None:
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    named = [path for text in re.findall(r'class="file"[^>]*>([^<]+)<', picture) for path in text.split()]
    assert len(named) > 5
    assert [problem for path in named if (problem := missing(path))] == []


def test_the_layers_on_the_page_are_those_of_the_import_rules() -> None:
    told = first_cells(section(PAGE, "Folders: who may import whom"))
    rows, layers = [sorted(row) for row in told], [sorted(layer) for layer in LAYERS]
    assert rows == layers, f"{PAGE}, Folders, is not LAYERS of tests/unit/test_import_rules.py"


def test_readme_s_table_of_folders_is_the_tree_that_is_there() -> None:
    told = [span for row in first_cells(section("README.md", "Reading the code")) for span in row]
    package = ROOT / PACKAGE
    folders = {f"{path.parent.relative_to(package).parts[0]}/" for path in package.glob("*/**/*.py")}
    loose = [path.name for path in package.glob("*.py") if not path.name.startswith("__")]
    there, place = {*folders, *loose}, "README.md, Reading the code"
    assert set(told) == there, f"{place}: no row for {there - set(told)}, none is {set(told) - there}"
    assert len(told) == len(there), f"{place}: named twice"


@pytest.mark.parametrize(
    ("span", "problem"),
    [
        ("loop.py:run_step", None),
        ("trainer/trainer.py:Trainer.train_step", None),
        ("types.py:Sample.zc_logprob", None),
        ("algorithms/advantages.py:ESTIMATORS", None),
        ("tests/unit/", None),
        ("README.md", None),
        ("loop.py:stride", "loop.py:stride: no such name in the file"),
        ("trainer/trainer.py:Trainer.fit", "trainer/trainer.py:Trainer.fit: no such name in the file"),
        ("trainer/turns.py", "trainer/turns.py: no such file"),
        ("turns/", "turns/: no such folder"),
    ],
)
def test_what_is_not_there_is_found(span: str, problem: str | None) -> None:
    assert is_path(span) and missing(span) == problem
