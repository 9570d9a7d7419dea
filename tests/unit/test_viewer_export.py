"""One HTML file with everything in it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.synthetic_run import write_synthetic_run

from megatron_laser.viewer.api import Viewer, ViewError
from megatron_laser.viewer.export import choose, write_export

PAGE = """<!doctype html><html><head><title>page</title><link rel="stylesheet" href="lib/style.css">
</head><body><script src="app.js" defer></script></body></html>"""
OF_GROUP = ("problem", "answer", "source", "row", "step", "prompt")


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("export") / "run"
    found = Viewer([write_synthetic_run(path, steps=30, responses=400, mean_length=30)])
    found.read_responses()
    yield found
    found.close()


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    (folder / "lib").mkdir()
    (folder / "index.html").write_text(PAGE)
    (folder / "app.js").write_text("const end = '</script>'; start();")
    (folder / "lib" / "style.css").write_text("@font-face { src: url(letters.woff2) } p { color: red }")
    (folder / "lib" / "letters.woff2").write_bytes(b"letters")
    return folder


def data_of(page: str) -> dict[str, Any]:
    """What the page's blocks hold, with the rows of responses together."""
    blocks = re.findall(r'<script id="([^"]+)" type="application/json\+gzip-base64">([^<]*)</script>', page)
    unpacked = {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in blocks}
    found: dict[str, Any] = unpacked.pop("data")
    for name, rows in unpacked.items():
        assert len(rows) <= found["export/responses?run=0"]["part"] and name.startswith("responses-0-")
        found["export/responses?run=0"].setdefault("rows", []).extend(rows)
    return found


def test_the_file_names_no_other_file(viewer: Viewer, web: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    size = write_export(viewer, path, web=web)
    page = path.read_text()
    assert size == path.stat().st_size
    assert "src=" not in page and "href=" not in page
    assert "url(data:font/woff2;base64," + base64.b64encode(b"letters").decode() in page
    assert (
        page.count("</script>") == page.count("<script") == 4
    )  # the data, two parts of responses, the page's own
    assert "<script defer>" in page


def test_modules_come_in_an_import_map_under_names_of_their_own(viewer: Viewer, tmp_path: Path) -> None:
    web = tmp_path / "web"
    (web / "lib").mkdir(parents=True)
    (web / "index.html").write_text('<head></head><script type="module" src="main.js"></script>')
    (web / "main.js").write_text(
        'import { a } from "./lib/a.js";\nimport "./b.js";\nstart(a, "./not/imported.js");'
    )
    (web / "b.js").write_text("export const late = () => import('./lib/a.js');")
    (web / "lib" / "a.js").write_text('import { late } from "../b.js";\nexport const a = "</script>";')
    write_export(viewer, tmp_path / "a.html", web=web)
    page = (tmp_path / "a.html").read_text()
    assert "src=" not in page and '<script type="module">import "viewer/main.js";</script>' in page
    match = re.search(r'<script type="importmap">(.*?)</script>', page)
    assert match is not None and match.start() < page.index('<script type="module">')
    imports = json.loads(match[1])["imports"]
    sources = {name: base64.b64decode(address.split(",")[1]).decode() for name, address in imports.items()}
    assert sources == {
        "viewer/main.js": 'import { a } from "viewer/lib/a.js";\nimport "viewer/b.js";\nstart(a, "./not/imported.js");',
        "viewer/b.js": "export const late = () => import('viewer/lib/a.js');",
        "viewer/lib/a.js": 'import { late } from "viewer/b.js";\nexport const a = "</script>";',
    }
    (web / "b.js").unlink()
    with pytest.raises(ViewError, match=r"b\.js, which cannot be read"):
        write_export(viewer, tmp_path / "b.html", web=web)


def test_the_data_answers_what_the_server_would(viewer: Viewer, web: Path, tmp_path: Path) -> None:
    write_export(viewer, tmp_path / "run.html", web=web)
    data = data_of((tmp_path / "run.html").read_text())
    for path in ("curves", "events", "responses"):
        assert data[f"api/{path}?run=0"] == json.loads(json.dumps(viewer.answer(path, {"run": "0"})))
    assert data["api/runs"]["live"] is False
    assert data["export/steps?run=0"]["7"] == viewer.answer("step", {"run": "0", "step": "7"})["spans"]
    parts, columns = data["export/responses?run=0"], data["api/responses?run=0"]
    for number in (0, 9, 399):
        row = parts["rows"][number]
        group = parts["groups"][row.pop("group")]
        whole = row | {name: group[name] for name in OF_GROUP} | {"votes": group["votes"]}
        expected = viewer.answer("response", {"run": "0", "id": str(number)})
        members = expected.pop("group")
        assert whole == expected
        assert group["ids"] == [member["id"] for member in members]
        scores = [columns["columns"]["score"][member] for member in group["ids"]]
        assert scores == [member["score"] for member in members]


def test_fewer_responses_are_whole_groups_the_newest_and_the_most_telling(
    viewer: Viewer, web: Path, tmp_path: Path
) -> None:
    run = viewer.runs[0]
    chosen = choose(run, 48)
    assert len(chosen) == 48 and chosen == sorted(chosen)
    assert set(range(376, 400)) <= set(chosen)  # half of them: the last three groups
    columns = viewer.answer("responses", {"run": "0"})["columns"]
    pairs = [
        (abs(s - r), i)
        for i, (s, r) in enumerate(zip(columns["score"], columns["reward"]))
        if None not in (s, r)
    ]
    assert max(pairs)[1] in chosen
    assert choose(run, 0) == [] and choose(run, None) == choose(run, 400) == list(range(400))
    write_export(viewer, tmp_path / "some.html", responses=48, web=web)
    data = data_of((tmp_path / "some.html").read_text())
    assert data["api/runs"]["runs"][0]["num_responses"] == data["api/responses?run=0"]["count"] == 48
    parts = data["export/responses?run=0"]
    assert [row["id"] for row in parts["rows"]] == list(range(48))
    assert sorted(place for group in parts["groups"] for place in group["ids"]) == list(range(48))
    lengths = [len(row["tokens"]["ends"]) for row in parts["rows"]]
    assert lengths == data["api/responses?run=0"]["columns"]["length"]


def test_a_file_that_would_be_too_large_is_not_written(viewer: Viewer, web: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    with pytest.raises(ViewError, match=r"with 400 responses, more than --max-mib .*about --responses \d+"):
        write_export(viewer, path, max_bytes=100_000, web=web)
    assert not path.exists()


def test_an_earlier_export_is_replaced_and_no_other_file(viewer: Viewer, web: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    first = write_export(viewer, path, web=web)
    assert write_export(viewer, path, web=web, responses=8) < first
    other = tmp_path / "metrics.jsonl"
    other.write_text("somebody's own")
    with pytest.raises(ViewError, match=r"metrics\.jsonl is there, and is no export"):
        write_export(viewer, other, web=web)
    assert other.read_text() == "somebody's own"
    with pytest.raises(ViewError, match="is a folder"):
        write_export(viewer, tmp_path, web=web)


def test_a_page_without_its_files_is_an_error_that_names_them(viewer: Viewer, tmp_path: Path) -> None:
    with pytest.raises(ViewError, match=r"index\.html is not there"):
        write_export(viewer, tmp_path / "a.html", web=tmp_path)
    (tmp_path / "index.html").write_text('<script src="gone.js"></script>')
    with pytest.raises(ViewError, match=r"gone\.js, which cannot be read"):
        write_export(viewer, tmp_path / "a.html", web=tmp_path)
