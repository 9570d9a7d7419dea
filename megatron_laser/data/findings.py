"""What there is to say about references and prompts before a run starts, and whether readouts' tokens are in them.

They must not: z_c is what the model says about a response, never part of one.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_laser.config.model_folder.special_tokens import ReadoutToken
from megatron_laser.data.prompts import PromptReport
from megatron_laser.data.readers import Row
from megatron_laser.data.references import why_unequal
from megatron_laser.errors import DataError, Finding, Level
from megatron_laser.rewards import GradingPool
from megatron_laser.types import Prompt

_BATCH = 1000  # texts for one call of the tokenizer

logger = logging.getLogger(__name__)

_NAMED = 3  # rows of each kind
_ASKED = 64  # different references that the grader is asked about
_OTHER = "-91736.25"  # an answer that no reference is expected to be
_REFUSED_SHARE = 0.5

_CURE = (
    "name the column with the final answers (data.answer_key), let tools/prepare_data.py make one, or grade with a "
    "reward.function of your own, which gets the column as it is"
)


def reference_findings(
    rows: Sequence[Row], *, name: str = "data.train", ask_grader: bool = True, deadline: float = 2.0
) -> list[Finding]:
    """Whether responses can equal the references at all: for rows read with `mathematics=True`.

    Args:
        name: of the setting with the files.
        ask_grader: let the mathematical grader read some of those that are no plain numbers, in a process of its own
            (a second).
        deadline: seconds for one of them.
    """
    if not rows:
        return []
    findings = []
    taken = [row for row in rows if row.taken_from]
    if taken:
        kinds = Counter(row.taken_from for row in taken)
        findings.append(
            Finding(
                "references",
                "note",
                f"{name}: {len(taken)} of {len(rows)} references were taken out of "
                + ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()),
                _examples((row.source, row.answer) for row in taken),
            )
        )
    faults = [(row, why) for row in rows if (why := why_unequal(row.answer))]
    if faults:
        counts = Counter(why for _, why in faults)
        level: Level = "error" if len(faults) > _REFUSED_SHARE * len(rows) else "warning"
        findings.append(
            Finding(
                "references",
                level,
                f"{name}: no response can equal {len(faults)} of {len(rows)} references: "
                + ", ".join(f"{why} ({count})" for why, count in counts.most_common()),
                _examples((row.source, row.answer) for row, _ in faults),
                _CURE,
            )
        )
    if ask_grader:
        bad = {row.row for row, _ in faults}
        findings += _unread([row for row in rows if row.row not in bad], name, deadline)
    if not findings:
        findings.append(Finding("references", "ok", f"{name}: {len(rows)} references, all of them answers"))
    return findings


def unusable_findings(
    rows: Sequence[Row], unusable: Callable[[str], str], *, name: str = "data.train"
) -> list[Finding]:
    """Whether the references are ones that a built-in verifier other than the mathematical one can use.

    Args:
        unusable: why one is not, "" where it is; see `rewards.AnswerForm`.
        name: of the setting with the files.
    """
    faults = [(row, why) for row in rows if (why := unusable(row.answer))]
    if not faults:
        return [Finding("references", "ok", f"{name}: {len(rows)} references, all of them answers")]
    level: Level = "error" if len(faults) > _REFUSED_SHARE * len(rows) else "warning"
    text = f"{name}: {len(faults)} of {len(rows)} references cannot be used, and their responses will have no grade"
    examples = _examples((f"{row.source}: {why}", row.answer) for row, why in faults)
    return [Finding("references", level, text, examples, "correct or remove these rows (docs/rewards.md)")]


def prompt_findings(report: PromptReport, *, name: str = "data.train") -> list[Finding]:
    """Lengths over the limit, and BOS tokens that prompts brought along.

    Args:
        report: of `build_prompts`.
        name: of the setting with the files.
    """
    lengths = sorted(report.lengths)
    if not lengths:
        return []
    at = {share: lengths[math.ceil(share * len(lengths)) - 1] for share in (0.5, 0.9, 0.99)}
    text = (
        f"{name}: {report.total} prompts of {lengths[0]} to {lengths[-1]} tokens (half have at most {at[0.5]}, "
        f"90 % {at[0.9]}, 99 % {at[0.99]}); "
    )
    limit = f"{report.section}.max_prompt_tokens = {report.max_prompt_tokens}"
    if report.rows:
        share = len(report.rows) / report.total
        level: Level = "error" if share == 1.0 else ("warning" if share > 0.01 else "note")
        finding = Finding(
            "prompt lengths",
            level,
            f"{text}{len(report.rows)} ({share:.1%}) are over {limit} and left out",
            tuple(f"{source}: {length} tokens" for source, length in report.rows[:_NAMED]),
            "" if level == "note" else f"raise {report.section}.max_prompt_tokens, or shorten the problems",
        )
    else:
        finding = Finding("prompt lengths", "ok", f"{text}none is over {limit}")
    findings = [finding]
    if report.bos_repeated:
        findings.append(
            Finding(
                "BOS",
                "warning",
                f"{name}: {len(report.bos_repeated)} of {report.total} prompts bring along the BOS that the tokenizer "
                "or its template writes; one of the two is left out",
                report.bos_repeated[:_NAMED],
                "the problems were rendered by a template before: give them plain, or set "
                f"{report.section}.apply_chat_template: false if the template's turns are in them already",
            )
        )
    return findings


def log_warnings(findings: Iterable[Finding]) -> None:
    """Log the warnings.

    Raises:
        DataError: an error is among them.
    """
    for finding in findings:
        if finding.level == "error":
            raise DataError(finding.line)
        if finding.level == "warning":
            logger.warning("%s", finding.line)


def _unread(rows: Sequence[Row], name: str, deadline: float) -> list[Finding]:
    """References that the grader cannot parse, among at most `_ASKED` different ones over the whole data."""
    places = {row.answer: row.source for row in reversed(rows) if not _is_number(row.answer)}
    texts = list(reversed(places))
    if not texts:
        return []
    step = max(1, math.ceil(len(texts) / _ASKED))
    asked = texts[::step]
    with GradingPool(workers=1, deadline=deadline) as pool:
        grades = pool.grade_many([(f"\\boxed{{{text}}}", _OTHER) for text in asked])
    unread = [text for text, grade in zip(asked, grades) if grade.outcome not in ("correct", "wrong")]
    if not unread:
        return []
    level: Level = "warning" if len(unread) > _REFUSED_SHARE * len(asked) else "note"
    return [
        Finding(
            "references",
            level,
            f"{name}: {len(unread)} of {len(asked)} references that were tried are no mathematics to the grader: only "
            "responses with the same words are right",
            _examples((places[text], text) for text in unread),
            _CURE if level == "warning" else "",
        )
    ]


def _is_number(text: str) -> bool:
    return text.lstrip("+-").replace(".", "", 1).isdecimal()


def _examples(found: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    lines: list[str] = []
    for source, text in found:
        if len(lines) == _NAMED:
            break
        lines.append(f"{source}: {text!r:.100}")
    return tuple(lines)


def score_tokens_in_data(
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    tokenizer: Any,
    tokens: Sequence[ReadoutToken],
    *,
    name: str = "data.train",
) -> list[Finding]:
    """Whether any prompt, chat template included, or any reference answer holds a token that a readout reads.

    A prompt with z_c in it shows the model the token outside its one place behind EOS, and an answer with it is
    one that no response should give.

    Args:
        rows: as read; `prompts` are made from them and may leave some out.
        tokenizer: a Hugging Face tokenizer.
        tokens: of all readouts; those without an id are passed over.
        name: of the setting with the files.

    Returns:
        An error for each token that is there, or one that says of all that they are not.
    """
    read = {one.token.id: one for one in reversed(tokens) if one.token.id is not None}
    if not read:
        return []
    found: dict[int, list[tuple[Row, bool]]] = {}
    for token_id, row, in_prompt in _places(rows, prompts, tokenizer, frozenset(read)):
        found.setdefault(token_id, []).append((row, in_prompt))
    if not found:
        words = ", ".join(read[token_id].words for token_id in reversed(read))
        return [Finding("score token", "ok", f"{name}: no prompt and no answer holds {words}")]
    return [
        Finding(
            "score token",
            "error",
            f"{name}: {len(places)} prompts or answers of {len(rows)} rows hold {read[token_id].words}",
            tuple(_place(*place, tokenizer, token_id) for place in places[:_NAMED]),
            f"choose a token for {read[token_id].setting} that is not in the data, or remove these rows",
        )
        for token_id, places in sorted(found.items())
    ]


def refuse_score_tokens(
    rows: Sequence[Row], prompts: Sequence[Prompt], tokenizer: Any, tokens: Sequence[ReadoutToken]
) -> None:
    """Raises DataError where `score_tokens_in_data` finds any."""
    findings = score_tokens_in_data(rows, prompts, tokenizer, tokens, name="the data")
    if errors := [finding.line for finding in findings if finding.level == "error"]:
        raise DataError("\n".join(errors))


def _places(
    rows: Sequence[Row], prompts: Sequence[Prompt], tokenizer: Any, ids: frozenset[int]
) -> Iterator[tuple[int, Row, bool]]:
    """(token id, row, whether its prompt holds it rather than its answer)."""
    by_number = {row.row: row for row in rows}
    for prompt in prompts:
        for token_id in ids.intersection(prompt.token_ids):
            yield token_id, by_number[prompt.row], True
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        encoded = tokenizer([row.answer for row in batch], add_special_tokens=False)["input_ids"]
        for row, token_ids in zip(batch, encoded, strict=True):
            for token_id in ids.intersection(token_ids):
                yield token_id, row, False


def _place(row: Row, in_prompt: bool, tokenizer: Any, token_id: int) -> str:
    if not in_prompt:
        return f"{row.source}: the answer"
    texts = [text for _, text in row.turns] + [row.problem]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if any(token_id in token_ids for token_ids in encoded):
        return f"{row.source}: the prompt"
    return f"{row.source}: what the chat template, system prompt or prompt suffix add to the prompt"
