"""A finished evaluation as later commands read it: its records, and prompts and responses as ids for any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_laser.data import ChatOptions, DataError, build_prompts
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.benchmarks.folder import RECORDS, RESPONSES
from megatron_laser.evaluation.benchmarks.settings import Benchmark, benchmark_rows
from megatron_laser.evaluation.model_folder import ModelFolder
from megatron_laser.evaluation.records import EvaluationRecord, read_records
from megatron_laser.evaluation.responses import SavedResponse
from megatron_laser.types import Prompt


@dataclass(frozen=True, slots=True)
class FinishedBenchmark:
    """One benchmark of an evaluation.

    Attributes:
        folder: its folder, in which records.jsonl is.
        benchmark: its settings; the data file need not be there any more.
        records: of all responses.
        model: the folder of the model that answered.
    """

    name: str
    folder: Path
    benchmark: Benchmark
    records: list[EvaluationRecord]
    model: str

    def ids(self) -> dict[int, str]:
        """Row -> the problem's name, where the data has names."""
        found = {}
        for line in (self.folder / "problems.jsonl").read_text(encoding="utf-8").splitlines():
            problem = json.loads(line)
            if problem["id"] is not None:
                found[problem["row"]] = problem["id"]
        return found

    def prompts(
        self, model: ModelFolder, *, apply_chat_template: bool, prompt_suffix: str, options: ChatOptions
    ) -> dict[int, Prompt]:
        """Row -> prompt, in `model`'s tokens; `options`: what its chat template is given besides.

        Raises:
            DataError: the data file is gone or another one by now, or a prompt is longer than the model can read.
        """
        if not self.benchmark.path.is_file():
            raise DataError(
                f"{self.folder}: the problems were read from {self.benchmark.path}, which is not there any more; put "
                "it back, or give `records.jsonl` itself, whose texts are then tokenized again"
            )
        rows = {row.row: row for row in benchmark_rows(self.benchmark)}
        wanted = sorted({record.row for record in self.records})
        for record in self.records:
            row = rows.get(record.row)
            if row is None or (row.problem, row.answer) != (record.problem, record.answer):
                raise DataError(
                    f"{self.benchmark.path}: row {record.row} is not the problem that was answered in {self.folder}; "
                    "the file has changed since"
                )
        prompts, dropped = build_prompts(
            [rows[row] for row in wanted],
            model.tokenizer,
            prompt_suffix=prompt_suffix,
            apply_chat_template=apply_chat_template,
            options=options,
            max_prompt_tokens=model.max_positions - 1,
            vocab_size=model.vocab_size,
            section=self.name,
        )
        if dropped.rows:
            raise DataError(f"{self.name}: {model.path} cannot read every prompt: {dropped}")
        return {prompt.row: prompt for prompt in prompts}

    def response_ids(self, model: ModelFolder) -> list[list[int]]:
        """The responses in `model`'s tokens.

        The sampled ids where they mean the same text to `model` (one tokenizer for both), the stop token included where
        it ends responses of `model`, too; else the texts tokenized, without an end.
        """
        saved = _saved_responses(self.folder / RESPONSES)
        found: list[list[int]] = []
        for record in self.records:
            response = saved.get((record.row, record.sample))
            ids = None if response is None else response.text_ids
            if ids is None or max(ids, default=0) >= model.vocab_size or model.decode(ids) != record.response:
                break
            end = [] if response is None or not record.scored else response.response_ids[len(ids) :]
            found.append([*ids, *(i for i in end if i in model.stop_token_ids)])
        else:
            return found
        texts = [record.response for record in self.records]
        return [
            [int(i) for i in ids] for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]


# What evaluations of earlier versions do not name.
_BEFORE_CHATS: dict[str, Any] = {"chat_template_arguments": {}, "system_prompt": ""}


def read_finished(folder: Path, *, only: Sequence[str] = ()) -> list[FinishedBenchmark]:
    """The benchmarks of the output folder of `megatron-laser eval`.

    Args:
        only: names of those that are wanted; none: all.

    Raises:
        TestTimeError: no finished evaluation, or no such benchmark.
        DataError: a broken file; names it.
    """
    file = folder / "results.json"
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        listed: dict[str, Any] = results["benchmarks"]
    except FileNotFoundError:
        raise TestTimeError(
            f"{folder} has no results.json: not the --output of a finished evaluation; run `megatron-laser eval` "
            "with it to the end, or give a JSON Lines file"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not the results of an evaluation ({error!r})") from error
    if unknown := [name for name in only if name not in listed]:
        raise TestTimeError(f"--only {', '.join(unknown)}: {folder} has {', '.join(listed)}")
    found = []
    for name in listed:
        if only and name not in only:
            continue
        settings = _BEFORE_CHATS | listed[name]["settings"]
        benchmark = Benchmark(**settings | {"path": Path(settings["path"])})
        records = read_records(folder / name / RECORDS)
        count = listed[name]["summary"]["num_responses"]
        if len(records) != count:
            raise DataError(
                f"{folder / name / RECORDS} has {len(records)} responses, but {file} tells of {count:.0f}; run "
                "`megatron-laser eval` with this --output to the end"
            )
        found.append(FinishedBenchmark(name, folder / name, benchmark, records, str(results["model"])))
    return found


def _saved_responses(file: Path) -> dict[tuple[int, int], SavedResponse]:
    if not file.is_file():
        return {}
    found: dict[tuple[int, int], SavedResponse] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                response = SavedResponse(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"{file} line {number} is not a saved response: {error}") from error
            found.setdefault((response.row, response.sample), response)
    return found
