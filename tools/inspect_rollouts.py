#!/usr/bin/env python
"""Read what a model answered: browse rollouts/step_N.jsonl or evaluation/*.jsonl of a run in the terminal.

    python tools/inspect_rollouts.py runs/laser/rollouts/step_40.jsonl
    python tools/inspect_rollouts.py FILE --wrong --min-score 0.5 --sort score    # fooled itself
    python tools/inspect_rollouts.py FILE --finish length --limit 5               # cut off
    python tools/inspect_rollouts.py FILE --show 17                               # one response in full
    python tools/inspect_rollouts.py runs/laser                                   # which files there are

The number in the first column is the line of the file; --show takes it. Below the list stands how the score
(above 0.5: the model calls itself right) agrees with the verifier, over all responses that match the filters.
On a terminal long output goes through a pager; in a pipe it is plain text.
Rollouts are written when logging.rollouts_every is above 0, evaluations when evaluation.every or data.test is set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

THRESHOLD = 0.5
_PIPED_WIDTH = 140
_SORT_KEYS = {"score": "score", "length": "response_ids_length", "advantage": "advantage"}
_FACTS = (
    *(
        "outcome",
        "reward",
        "extracted",
        "finish_reason",
        "response_ids_length",
        "scored",
        "score",
        "zc_logprob",
    ),
    *("advantage", "mean_logprob", "answer_class", "step", "epoch", "weight_version", "row", "sample"),
)


class InspectError(Exception):
    """A file that cannot be shown, or a line that is not there."""


def read_responses(path: Path) -> list[dict[str, Any]]:
    """The file's lines as dictionaries, each with its number as "line" (from 1)."""
    responses = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    responses.append({**_response(text, path, number), "line": number})
    except OSError as error:
        raise InspectError(f"{path}: cannot be read: {error.strerror or error}") from error
    return responses


def _response(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise InspectError(f"{path} line {number}: not JSON ({error})") from error
    if not isinstance(record, dict) or not {"response", "reward", "outcome"} <= record.keys():
        raise InspectError(
            f"{path} line {number}: expected a response (rollouts/step_N.jsonl or evaluation/*.jsonl), "
            "with response, reward and outcome"
        )
    return record


def is_right(response: dict[str, Any]) -> bool:
    """The verifier's verdict."""
    return float(response["reward"] or 0.0) > 0.5  # null: grading failed


def selected(responses: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Those that match every filter, sorted as asked (highest first; without a value last)."""
    found = [response for response in responses if _matches(response, options)]
    if options.sort is not None:
        key = _SORT_KEYS[options.sort]
        sign = 1.0 if options.ascending else -1.0

        def place(response: dict[str, Any]) -> tuple[bool, float]:
            value = response.get(key)
            return value is None, 0.0 if value is None else sign * value

        found.sort(key=place)
    return found


def _matches(response: dict[str, Any], options: argparse.Namespace) -> bool:
    score = response.get("score")
    return (
        (options.outcome is None or response["outcome"] in options.outcome)
        and (options.verdict is None or is_right(response) == (options.verdict == "right"))
        and (options.finish is None or response.get("finish_reason") == options.finish)
        and (options.row is None or response.get("row") == options.row)
        and (options.min_score is None or (score is not None and score >= options.min_score))
        and (options.max_score is None or (score is not None and score <= options.max_score))
    )


def response_table(responses: Sequence[dict[str, Any]]) -> Table:
    """One line for each response, with the end of its text."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("#", "row", "verdict", "outcome", "finish", "score", "adv", "tokens"):
        right = name in ("#", "score", "adv", "tokens")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("end of the response", no_wrap=True, overflow="ellipsis", ratio=1)
    for response in responses:
        right = is_right(response)
        table.add_row(
            str(response["line"]),
            f"{response.get('row', '')}.{response.get('sample', '')}",
            Text("right" if right else "wrong", style="green" if right else "red"),
            str(response["outcome"]),
            str(response.get("finish_reason", "")),
            _number(response.get("score")),
            _number(response.get("advantage")),
            str(response.get("response_ids_length", "")),
            Text(" ".join(str(response["response"]).split())[-80:]),
        )
    return table


def confusion_table(responses: Sequence[dict[str, Any]]) -> Table:
    """How the score's verdict agrees with the verifier's."""
    table = Table(title="score and verifier", title_justify="left", box=None, header_style="bold")
    for name in ("", f"score > {THRESHOLD}", f"score <= {THRESHOLD}", "no score", "called rightly"):
        table.add_column(name, justify="left" if not name else "right")
    for label, right in (("right", True), ("wrong", False)):
        scores = [response.get("score") for response in responses if is_right(response) == right]
        above = sum(score is not None and score > THRESHOLD for score in scores)
        below = sum(score is not None and score <= THRESHOLD for score in scores)
        agreeing = above if right else below
        share = f"{agreeing / (above + below):.1%}" if above + below else "-"
        table.add_row(label, str(above), str(below), str(len(scores) - above - below), share)
    return table


def full_response(response: dict[str, Any]) -> RenderableType:
    """Everything about one response."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("verdict", "right" if is_right(response) else "wrong")
    for name in _FACTS:
        if name in response:
            value = response[name]
            text = _number(value) if value is None or isinstance(value, float) else str(value)
            facts.add_row(name, Text(text))
    return Group(
        Text("problem", style="bold"),
        Text(str(response.get("problem", ""))),
        Text("\nreference answer", style="bold"),
        Text(str(response.get("answer", ""))),
        Text("\nresponse", style="bold"),
        Text(str(response["response"])),
        Text(""),
        facts,
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.3f}"


def listing(responses: Sequence[dict[str, Any]], options: argparse.Namespace) -> RenderableType:
    """The list, how many there are, and the confusion of all that match."""
    found = selected(responses, options)
    shown = found[: options.limit] if options.limit else found
    count = f"{len(found)} of {len(responses)} responses match"
    if len(shown) < len(found):
        count += f", the first {len(shown)} are shown (--limit)"
    parts: list[RenderableType] = [response_table(shown)] if shown else []
    return Group(*parts, Text(f"\n{count}\n", style="dim"), confusion_table(found))


def _check_file(path: Path) -> None:
    if path.is_dir():
        files = sorted(
            {*path.glob("*.jsonl"), *path.glob("rollouts/*.jsonl"), *path.glob("evaluation/*.jsonl")}
        )
        names = [f"  {file}" for file in files if file.name != "metrics.jsonl"]
        if names:
            raise InspectError("\n".join([f"{path} is a folder; name one of its files:", *names]))
        raise InspectError(f"{path}: no rollouts/*.jsonl or evaluation/*.jsonl (set logging.rollouts_every)")
    if not path.is_file():
        raise InspectError(f"{path}: no such file")


def arguments(values: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="rollouts/step_N.jsonl or evaluation/SPLIT_step_N.jsonl")
    parser.add_argument(
        "--show", type=int, metavar="N", help="line N in full: problem, response, all numbers"
    )
    parser.add_argument(
        "--outcome",
        action="append",
        help="only this outcome (correct, wrong, no_answer, unparsable, timeout, crash); may be repeated",
    )
    verdict = parser.add_mutually_exclusive_group()
    verdict.add_argument(
        "--right", dest="verdict", action="store_const", const="right", help="only right ones"
    )
    verdict.add_argument(
        "--wrong", dest="verdict", action="store_const", const="wrong", help="only wrong ones"
    )
    parser.add_argument("--min-score", type=float, metavar="S", help="only with a score of at least S")
    parser.add_argument("--max-score", type=float, metavar="S", help="only with a score of at most S")
    parser.add_argument("--finish", choices=("stop", "length", "abort"), help="how the response ended")
    parser.add_argument("--row", type=int, help="only responses to the problem in this row of the data")
    parser.add_argument("--sort", choices=tuple(_SORT_KEYS), help="highest first; default: as in the file")
    parser.add_argument("--ascending", action="store_true", help="with --sort: lowest first")
    parser.add_argument("--limit", type=int, default=50, help="list at most so many; 0: all (default: 50)")
    parser.add_argument("--no-pager", action="store_true", help="never start a pager")
    return parser.parse_args(values)


def main(values: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Print what was asked for; exit status 2 when the file cannot be shown."""
    options = arguments(values)
    if console is None:
        width = None if sys.stdout.isatty() else shutil.get_terminal_size((_PIPED_WIDTH, 24)).columns
        console = Console(width=width, highlight=False)
    try:
        _check_file(options.file)
        responses = read_responses(options.file)
        if options.show is None:
            picture = listing(responses, options)
        else:
            wanted = [response for response in responses if response["line"] == options.show]
            if not wanted:
                raise InspectError(f"--show {options.show}: {options.file} has lines 1 to {len(responses)}")
            picture = full_response(wanted[0])
    except InspectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = console.render_lines(picture, pad=False)
    if console.is_terminal and not options.no_pager and len(lines) >= console.height:
        with console.pager(styles=True):
            console.print(picture)
    else:
        console.print(picture)
    return 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
