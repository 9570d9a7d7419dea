"""Runs as one HTML file that needs no server: the page, its scripts and styles, and the data it would ask for.

The page's data block is `<script id="data" type="application/json+gzip-base64">`: base64 of gzip of a JSON object
{address: object}, with addresses as the page asks the server: "api/runs", "api/version", and for each run
"api/curves?run=ID" (all metrics), "api/responses?run=ID", "api/events?run=ID", and two that only exports have:

    "export/steps?run=ID"      {"STEP": spans}, of the steps with a timeline; metrics of a step are in the curves
    "export/responses?run=ID"  {"part": rows in a part, "groups": [...]}; a group is {"ids", "problem", "answer",
                               "source", "row", "step", "prompt", "votes"}. The `group` of api/response is made of the
                               index's columns at `ids`.

Rows of responses lie in blocks of their own, `<script id="responses-ID-PART">`, packed in the same way, so that a page
with 10,000 of them unpacks those that are looked at: a row is what api/response gives without `group`, `votes` and what
is the same for its group: {"group": place in groups, ...}.
"""

from __future__ import annotations

import base64
import gzip
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.files import write_atomically
from megatron_laser.viewer.api import OneRun, Viewer, ViewError
from megatron_laser.viewer.response_index import CODED, COLUMNS
from megatron_laser.viewer.server import to_json, web_folder

DATA_TYPE = "application/json+gzip-base64"
_PART = 200  # rows of responses that are unpacked together
_OF_GROUP = ("problem", "answer", "source", "row", "step", "prompt")
_SCRIPT = re.compile(r'<script\b([^>]*?)\ssrc="([^":]+)"([^>]*)>\s*</script>')
_MODULE = re.compile(r'<script type="module" src="([^":]+)">\s*</script>')
_IMPORT = re.compile(r"""(\b(?:from|import)\s*\(?\s*)(["'])(\.{1,2}/[^"']+)\2""")
_OWN = "viewer/"  # what the page's modules are called in an export
_PRELOAD = re.compile(r'<link\b[^>]*?rel="modulepreload"[^>]*>\n?')
_STYLE = re.compile(r'<link\b[^>]*?href="([^":]+\.css)"[^>]*>')
_URL = re.compile(r"""url\((["']?)([^"':)]+)\1\)""")
_IMAGE_TYPES = {
    ".woff2": "font/woff2",
    ".woff": "font/woff",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".ttf": "font/ttf",
}


def write_export(
    viewer: Viewer,
    path: Path,
    *,
    responses: int | None = None,
    max_bytes: int = 64 << 20,
    web: Path | None = None,
) -> int:
    """Write the file; returns its size in bytes.

    Args:
        responses: of each run, in whole groups: half the newest, half those whose score and label differ most; None:
            all. web: the page's files.

    Raises:
        ViewError: it would be larger than `max_bytes`, the page's files are not there, or `path` is something else.
    """
    _check_place(path)
    viewer.read_responses()
    data: dict[str, Any] = {}
    blocks: dict[str, str] = {}
    listed = viewer.list_runs({})
    listed["live"] = False
    for run, entry in zip(viewer.runs, listed["runs"], strict=True):
        chosen = choose(run, responses)
        entry["num_responses"] = len(chosen)
        query = {"run": run.id}
        data[f"api/curves?run={run.id}"] = viewer.curves(query)
        data[f"api/events?run={run.id}"] = viewer.events(query)
        data[f"api/responses?run={run.id}"] = _columns_of(run, chosen)
        data[f"export/steps?run={run.id}"] = {
            str(step): run.files.spans_of(step) for step in run.files.timeline_steps
        }
        rows, groups = _responses_of(viewer, run, chosen)
        data[f"export/responses?run={run.id}"] = {"part": _PART, "groups": groups}
        for start in range(0, len(rows), _PART):
            blocks[f"responses-{run.id}-{start // _PART}"] = _packed(rows[start : start + _PART])
    data |= {"api/runs": listed, "api/version": {"version": listed["version"]}}
    page = page_with_data(web_folder() if web is None else web, {"data": _packed(data), **blocks}).encode()
    if len(page) > max_bytes:
        shown = sum(entry["num_responses"] for entry in listed["runs"])
        fit = shown * max_bytes // len(page) // len(viewer.runs)
        raise ViewError(
            f"{path} would have {len(page) / 2**20:.0f} MiB with {shown} responses, more than --max-mib "
            f"{max_bytes / 2**20:g}: about --responses {fit} of each run fit, or raise --max-mib"
        )
    write_atomically(path, page)
    return len(page)


def _check_place(path: Path) -> None:
    """An earlier export is replaced; a folder, or a file that somebody may still want, is not."""
    if path.is_dir():
        raise ViewError(f"--export {path} is a folder: name a file in it, {path / 'run.html'}")
    if path.exists() and DATA_TYPE.encode() not in path.read_bytes():
        raise ViewError(f"--export {path} is there, and is no export of the viewer: choose another name")


def choose(run: OneRun, limit: int | None) -> list[int]:
    """Ids of the responses that go into a file, in their order; whole groups, no more than `limit`."""
    index = run.index
    everything = list(range(index.count))
    if limit is None or limit >= index.count:
        return everything
    groups: list[list[int]] = []
    seen: set[int] = set()
    for number in everything:
        if number not in seen:
            groups.append(index.group(number))
            seen.update(groups[-1])
    columns = index.columns()["columns"]

    def surprise(group: Sequence[int]) -> float:
        pairs = [(columns["score"][number], columns["reward"][number]) for number in group]
        return max(
            (abs(score - reward) for score, reward in pairs if None not in (score, reward)), default=0.0
        )

    newest, telling = list(reversed(groups)), sorted(groups, key=surprise, reverse=True)
    chosen: set[int] = set()
    for order, room in ((newest, limit // 2), (telling, limit)):
        for group in order:
            if chosen.isdisjoint(group) and len(chosen) + len(group) <= room:
                chosen.update(group)
    return sorted(chosen)


def _columns_of(run: OneRun, chosen: Sequence[int]) -> dict[str, Any]:
    found = run.index.columns()
    columns = {name: [found["columns"][name][number] for number in chosen] for name in COLUMNS}
    return {
        "count": len(chosen),
        "complete": True,
        "columns": columns,
        "tables": {name: found["tables"][name] for name in CODED},
    }


def _packed(data: Any) -> str:
    return base64.b64encode(gzip.compress(to_json(data), compresslevel=6, mtime=0)).decode()


def _responses_of(
    viewer: Viewer, run: OneRun, chosen: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and groups."""
    place = {number: own for own, number in enumerate(chosen)}
    rows: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    group_of: dict[int, int] = {}
    for number in chosen:
        full = viewer.one_response(run, number, votes=number not in group_of)
        if number not in group_of:
            members = [member["id"] for member in full["group"]]
            group_of |= dict.fromkeys(members, len(groups))
            groups.append(
                {
                    "ids": [place[member] for member in members],
                    "votes": full["votes"],
                    **{name: full[name] for name in _OF_GROUP},
                }
            )
        left_out = (*_OF_GROUP, "group", "votes")
        row = {name: value for name, value in full.items() if name not in left_out}
        rows.append(row | {"id": place[number], "group": group_of[number]})
    return rows, groups


def page_with_data(web: Path, blocks: Mapping[str, str]) -> str:
    """index.html with scripts, styles, fonts and blocks of packed data in it, by their ids.

    Raises:
        ViewError: a file that it names is not there, or a script has what ends a script inside a page.
    """
    try:
        page = (web / "index.html").read_text(encoding="utf-8")
    except OSError:
        raise ViewError(
            f"{web}/index.html is not there: the package was installed without the viewer's page"
        ) from None
    page = _PRELOAD.sub("", page)  # there is nothing to fetch ahead
    page = _STYLE.sub(lambda match: f"<style>\n{_style(web / match[1])}\n</style>", page)
    page = _MODULE.sub(lambda match: _modules(web, match[1]), page)
    page = _SCRIPT.sub(
        lambda match: f"<script{match[1]}{match[3]}>\n{_script(web / match[2])}\n</script>", page
    )
    data = "".join(
        f'<script id="{name}" type="{DATA_TYPE}">{packed}</script>\n' for name, packed in blocks.items()
    )
    # Behind all that is seen, which is painted meanwhile. Modules run when the whole page has been read.
    end = page.rfind("</body>")
    return page[:end] + data + page[end:] if end >= 0 else page + data


def _modules(web: Path, main: str) -> str:
    """A module and all that it imports, as data: addresses in an import map: a page that is a file may load no other.

    A module in a data: address has no place that "./other.js" could start from, so these become names of the map.
    """
    sources: dict[str, str] = {}
    left = [main]
    while left:
        name = left.pop()
        if name in sources:
            continue

        def named(match: re.Match[str], beside: str = name) -> str:
            other = posixpath.normpath(posixpath.join(posixpath.dirname(beside), match[3]))
            left.append(other)
            return f"{match[1]}{match[2]}{_OWN}{other}{match[2]}"

        sources[name] = ""  # circles are allowed
        sources[name] = _IMPORT.sub(named, _text(web / name))
    addresses = {
        _OWN + name: f"data:text/javascript;base64,{base64.b64encode(source.encode()).decode()}"
        for name, source in sorted(sources.items())
    }
    table = to_json({"imports": addresses}).decode()
    start = f'<script type="module">import "{_OWN}{main}";</script>'
    return f'<script type="importmap">{table}</script>\n{start}'


def _style(path: Path) -> str:
    """A style sheet with the fonts and images that it names inside."""

    def inside(match: re.Match[str]) -> str:
        file = path.parent / match[2]
        kind = _IMAGE_TYPES.get(file.suffix)
        if kind is None or not file.is_file():
            return match[0]
        return f"url(data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()})"

    return _URL.sub(inside, _text(path).replace("</style", "<\\/style"))


def _script(path: Path) -> str:
    # Within strings and regular expressions, where alone a script can have it, the backslash changes nothing.
    return _text(path).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ViewError(f"the viewer's page names {path}, which cannot be read: {error}") from None
