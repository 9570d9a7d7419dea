"""The files of the viewer's page: what no browser has to be started for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.source_tree import ROOT

WEB = ROOT / "megatron_laser" / "viewer" / "web"
OWN = sorted(path for path in WEB.glob("*.js"))
_FROM = re.compile(r"""\bfrom\s*["'](\./[^"'\n]+)["']""")


def imported(path: Path, seen: set[Path]) -> set[Path]:
    """A module and all that it imports."""
    if path not in seen:
        seen.add(path)
        for name in _FROM.findall(path.read_text(encoding="utf-8")):
            imported((path.parent / name).resolve(), seen)
    return seen


def test_the_page_fetches_ahead_what_it_imports_and_nothing_else():
    page = (WEB / "index.html").read_text(encoding="utf-8")
    ahead = re.findall(r'<link rel="modulepreload" href="([^"]+)">', page)
    needed = {path.relative_to(WEB).as_posix() for path in imported(WEB / "main.js", set())}
    assert sorted(ahead) == sorted(needed - {"main.js"})
    assert {path.name for path in OWN} == {name for name in needed if "/" not in name} | {"first.js"}


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_a_module_is_short_and_makes_no_markup_of_text(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    assert text.startswith("// "), "its first line says what it does"
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
    ):
        assert way not in text, f"{path.name} uses {way}"
    assert max(len(line) for line in text.splitlines()) <= 120


def test_nothing_is_loaded_from_elsewhere():
    """Addresses in the page's own files; those in libraries are names of XML and links in comments."""
    for path in [*OWN, *WEB.glob("*.css"), WEB / "index.html"]:
        assert not re.search(r"https?://|//[a-z]+\.[a-z]+/", path.read_text(encoding="utf-8")), path.name


def test_libraries_are_those_of_the_script_with_their_licences_and_small():
    script = (ROOT / "tools" / "vendor_viewer.sh").read_text(encoding="utf-8")
    pinned = re.findall(r"^([a-z]+) (\d+\.\d+\.\d+) \S{80,}==$", script, re.MULTILINE)
    said = (WEB / "vendor" / "VERSIONS.txt").read_text(encoding="utf-8")
    assert [tuple(line.split()) for line in said.splitlines()[2:]] == pinned
    names = {path.name for path in (WEB / "vendor").iterdir()}
    assert {f"LICENSE.{name}.txt" for name, _ in pinned} <= names
    assert names == {*re.findall(r"^[a-z]+ \S+ (\S+\.\w+)$", script, re.MULTILINE), "VERSIONS.txt"}
    assert sum(path.stat().st_size for path in (WEB / "vendor").iterdir()) < 450_000
    uplot = (WEB / "vendor" / "uplot.js").read_text(encoding="utf-8")
    assert dict(pinned)["uplot"] in uplot[:300]


def test_keys_of_the_documentation_are_those_of_the_page():
    page = (WEB / "keys.js").read_text(encoding="utf-8")
    documented = (
        (ROOT / "docs" / "viewer.md").read_text(encoding="utf-8").partition("## Keys")[2].partition("##")[0]
    )
    for key in ("/", "d", "?", "j", "k", "v", "Esc", "Enter", "Tab"):
        assert f"`{key}`" in documented and re.search(rf'"[^"]*{re.escape(key)}[^"]*", "', page), key
    views = re.findall(r'\{ name: "(\w+)", label', (WEB / "main.js").read_text(encoding="utf-8"))
    assert f"`1` to `{len(views)}`" in documented and f"1 – {len(views)}" in page
