"""The report says what was changed while a run was under way."""

import json

from megatron_laser.report.changed_settings import changed_settings
from megatron_laser.report.run_data import Run


def run(folder, record=None):
    folder.mkdir()
    if record is not None:
        (folder / "run.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return Run(folder, folder.name, "LaSeR", {}, [])


def test_changes_and_branches_have_a_section_and_other_runs_none(tmp_path):
    lr = {"step": 41, "key": "optimizer.lr", "from": 1e-6, "to": 5e-7, "kind": "learning", "time": "t"}
    recompute = {
        "step": 21,
        "key": "model.recompute",
        "from": "none",
        "to": "full",
        "kind": "running",
        "time": "t",
    }
    changed = run(tmp_path / "changed", {"changes": [lr, recompute]})
    branch = run(tmp_path / "branch", {"branched_from": {"folder": "/runs/a", "step": 20, "id": "x"}})
    plain, broken, bare = run(tmp_path / "plain", {}), run(tmp_path / "broken", "{"), run(tmp_path / "bare")
    text = "\n".join(changed_settings([changed, plain, branch, broken, bare]))
    assert text.startswith("## Changed on the way")
    rows = [line for line in text.splitlines() if line.startswith(("| 21", "| 41"))]
    assert rows == [
        "| 21 | `model.recompute` | none | full | how it runs |",
        "| 41 | `optimizer.lr` | 1e-06 | 5e-07 | what is learned |",
    ]
    assert "A branch: it began with what `/runs/a` was after step 20." in text
    assert "plain" not in text and "broken" not in text
    assert changed_settings([plain, broken, bare]) == []
