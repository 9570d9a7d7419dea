"""The report's section on what went wrong in each run besides its numbers, or that nothing did."""

from __future__ import annotations

from megatron_laser.observability.alarms import settings_of
from megatron_laser.report.run_data import Run
from megatron_laser.report.what_happened import NOTHING, read_events, what_happened


def went_wrong(runs: list[Run]) -> list[str]:
    """Heading and Markdown: a list for each run, the alarms by name only, since they have a section of their own."""
    told = [
        (run.label, what_happened(run.rows, read_events(run.folder), settings_of(run.config)).wrong)
        for run in runs
    ]
    if not any(wrong for _, wrong in told):
        return ["## Nothing went wrong\n", f"As far as the files say: {NOTHING}\n"]
    lists = [
        f"**{label}**\n\n" + "\n".join(f"- {_plain(sentence)}" for sentence in wrong) + "\n"
        if wrong
        else f"**{label}**: nothing.\n"
        for label, wrong in told
    ]
    return ["## What went wrong\n", "\n".join(lists)]


def _plain(sentence: str) -> str:
    """Text of logs holds characters that Markdown takes for its own."""
    return sentence.replace("<", "&lt;").replace("*", "\\*").replace("|", "\\|")
