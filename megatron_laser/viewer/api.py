"""What the page asks for, by path and query: the server sends these objects, an export holds them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_laser.errors import UserError
from megatron_laser.viewer.alarms import run_alarms
from megatron_laser.viewer.response_index import ResponseIndex
from megatron_laser.viewer.run_folder import RunFolder
from megatron_laser.viewer.votes import AnswerForms, Votes

logger = logging.getLogger(__name__)

_BETWEEN_LOOKS = 0.5  # seconds: of several pages that ask, one has the files looked at
_GROUP_COLUMNS = ("reward", "score", "length", "answer", "finish")


class ViewError(UserError, ValueError):
    """A folder that holds no run, or nothing to show."""


class NotThere(LookupError):
    """A path, run, step or response that does not exist."""


class OneRun:
    """A run's folder and the index of its responses."""

    def __init__(self, number: int, folder: Path) -> None:
        self.id = str(number)
        self.label = ""
        self.files = RunFolder(folder)
        self.forms = AnswerForms(self.files.config)
        self.index = ResponseIndex(folder / "rollouts", self.forms)
        self._alarms: tuple[int, list[dict[str, Any]]] = (-1, [])

    def alarms(self) -> list[dict[str, Any]]:
        """Of the metrics that are there by now."""
        version = self.files.version
        if self._alarms[0] != version:
            self._alarms = (version, run_alarms(self.files.rows(), self.files.config))
        return self._alarms[1]

    @property
    def version(self) -> int:
        """Goes up with everything that is new in it."""
        return self.files.version + self.index.version


class Viewer:
    """Some runs, and what the page may ask about them. Safe to use from several threads."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read all but the responses, which `start` or `read_responses` reads.

        Raises:
            ViewError: no folder, or one without metrics.jsonl, rollouts and config.yaml.
        """
        if not folders:
            raise ViewError("nothing to view: name the output folders of one or more runs")
        for folder in folders:
            if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", "rollouts")):
                what = "does not exist" if not folder.exists() else "holds no run"
                raise ViewError(
                    f"{folder} {what}: expected the output_dir of a run, with metrics.jsonl and config.yaml in it"
                )
        distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
        self.runs = [OneRun(number, folder) for number, folder in enumerate(distinct)]
        names = Counter(run.files.name for run in self.runs)
        for run in self.runs:
            name = run.files.name
            run.label = name if names[name] == 1 else f"{name} ({run.files.folder.name} #{int(run.id) + 1})"
        self.votes = Votes()
        self._looked = time.monotonic()
        self._look = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, every: float = 1.0) -> None:
        """Read responses, and what runs write later, in a thread of its own until `close`."""

        def work() -> None:
            while not self._ended.is_set():
                try:
                    self.refresh()
                    self.read_responses()
                except (
                    Exception
                ) as error:  # of files that somebody wrote by hand; what comes later is still shown
                    logger.warning("a run's files cannot be read: %s: %s", type(error).__name__, error)
                self._ended.wait(every)

        self._thread = threading.Thread(target=work, name="viewer index", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and the worker that compares answers."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.votes.close()

    def refresh(self) -> None:
        """Look for new lines in all files but the responses', unless somebody has just done so."""
        with self._look:
            if time.monotonic() - self._looked < _BETWEEN_LOOKS:
                return
            for run in self.runs:
                run.files.refresh()
            self._looked = time.monotonic()

    def read_responses(self) -> None:
        """Read new dumps of all runs."""
        for run in self.runs:
            run.index.refresh(run.files.last_step)
            if self._ended.is_set():
                return

    def answer(self, path: str, query: Mapping[str, str]) -> Any:
        """The object of a path below api/.

        Raises:
            NotThere: no such path, run, step or response; says which.
        """
        work = _PATHS.get(path)
        if work is None:
            raise NotThere(f"no api/{path}; there are {', '.join(_PATHS)}")
        return work(self, query)

    def version(self, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A number that goes up with everything new."""
        self.refresh()
        return {"version": sum(run.version for run in self.runs)}

    def list_runs(self, query: Mapping[str, str]) -> dict[str, Any]:
        """All runs, without their numbers."""
        self.refresh()
        return {
            **self.version(),
            "live": any(run.files.state == "running" for run in self.runs),
            "runs": [
                {
                    "id": run.id,
                    "name": run.label,
                    "folder": str(run.files.folder),
                    "steps": run.files.last_step or 0,
                    "total_steps": run.files.total_steps,
                    "state": run.files.state,
                    "settings": run.files.settings(),
                    "metrics": run.files.metric_names,
                    "num_responses": run.index.count,
                    "has_tokens": run.index.has_tokens,
                    "indexed": run.index.complete,
                }
                for run in self.runs
            ],
        }

    def curves(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Metrics of a run over its steps: those of `names`, separated by commas, or all."""
        names = query.get("names")
        return self._run(query).files.curves(None if names is None else names.split(","))

    def responses(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The columns of all responses of a run that have been read by now."""
        return self._run(query).index.columns()

    def response(self, query: Mapping[str, str]) -> dict[str, Any]:
        """One response with its tokens, its group and the group's votes."""
        return self.one_response(self._run(query), _integer(query, "id"))

    def one_response(self, run: OneRun, number: int, *, votes: bool = True) -> dict[str, Any]:
        """As `response`; votes: whether the group's are counted, else null."""
        record = run.index.record(number)
        if record is None:
            raise NotThere(f"run {run.id} has no response {number}; it has {run.index.count}")
        group = [{"id": member, **_renamed(run, member)} for member in run.index.group(number)]
        counted = None
        if votes:
            counted = self.votes.of(
                [member["answer"] for member in group],
                [member["reward"] for member in group],
                [member["score"] for member in group],
                run.forms(str(record.get("source") or "")),
            )
        own = next((member["answer"] for member in group if member["id"] == number), None)
        return {**response_fields(number, record), "answer_given": own, "group": group, "votes": counted}

    def step(self, query: Mapping[str, str]) -> dict[str, Any]:
        """All metrics of a step and the spans of its phases."""
        run, step = self._run(query), _integer(query, "step")
        metrics = run.files.metrics_of(step)
        if not metrics:
            raise NotThere(f"run {run.id} has no step {step}")
        return {"metrics": metrics, "spans": run.files.spans_of(step)}

    def events(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Events, checkpoints, alarms, and the steps that have a timeline."""
        run = self._run(query)
        files = run.files
        return {
            "events": files.events,
            "checkpoints": files.checkpoints,
            "alarms": run.alarms(),
            "timeline_steps": files.timeline_steps,
        }

    def _run(self, query: Mapping[str, str]) -> OneRun:
        for run in self.runs:
            if run.id == query.get("run"):
                return run
        raise NotThere(f"no run {query.get('run')!r}; there are {', '.join(run.id for run in self.runs)}")


def response_fields(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a dump as the page reads it; `tokens` is null where the line has none."""
    tokens = None
    if isinstance(record.get("token_ends"), list):
        tokens = {
            "ends": record["token_ends"],
            "logprob": record.get("token_logprobs"),
            "policy_logprob": record.get("token_policy_logprobs"),
            "entropy": record.get("token_entropy"),
        }
    as_they_are = (
        "step",
        "row",
        "sample",
        "source",
        "problem",
        "answer",
        "response",
        "reward",
        "score",
        "advantage",
    )
    more = ("outcome", "finish_reason", "zc_logprob", "prompt", "weight_version")
    return {
        "id": number,
        **{name: record.get(name) for name in (*as_they_are, *more)},
        "length": record.get("response_ids_length"),
        "tokens": tokens,
        "readouts": record.get("readouts") or {},
    }


def _renamed(run: OneRun, member: int) -> dict[str, Any]:
    values = run.index.values(member, _GROUP_COLUMNS)
    values["finish_reason"] = values.pop("finish")
    return values


def _integer(query: Mapping[str, str], name: str) -> int:
    try:
        return int(query.get(name, ""))
    except ValueError:
        raise NotThere(f"{name}={query.get(name, '')!r} is not a number") from None


_PATHS = {
    "runs": Viewer.list_runs,
    "curves": Viewer.curves,
    "responses": Viewer.responses,
    "response": Viewer.response,
    "step": Viewer.step,
    "events": Viewer.events,
    "version": Viewer.version,
}
