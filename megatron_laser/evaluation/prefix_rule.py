"""Where the prefixes of a response are scored at test time, and how: a readout at `every` or `delimiter`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_laser.config import RunConfig
from megatron_laser.config.readouts import Readout, readouts
from megatron_laser.config.schema.readouts import ReadoutConfig
from megatron_laser.data.delimiters import Delimiter
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.score_rule import ScoreRule, token_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrefixRule:
    """The places of a response, and the score that is read there.

    rule: of the log-probs behind a prefix. every: behind each so many tokens; 0: behind each occurrence of `delimiter`
    instead, which `finder` finds. name: of the run's readout; "" where the run has none.
    """

    rule: ScoreRule
    every: int = 0
    delimiter: str = ""
    name: str = ""
    finder: Delimiter | None = field(default=None, compare=False, repr=False)

    def places(self, response_ids: Sequence[int]) -> list[int]:
        """How many tokens lie before each place, increasing: as in training, not behind the response's last token."""
        if self.finder is None:
            return list(range(self.every, len(response_ids), self.every))
        found: list[int] = self.finder.ends(np.asarray(response_ids, dtype=np.int64)).tolist()
        return [place for place in found if place < len(response_ids)]

    def stretch(self, tokens: int, left: int) -> tuple[int, tuple[int, ...]]:
        """How to go on behind `tokens` tokens of a response: (most further tokens, ids with which to pause).

        There is no place within such a stretch, and perhaps one at its end: see `is_place`.
        """
        if self.finder is not None:
            return left, tuple(self.finder.last_tokens)
        return min(left, self.every - tokens % self.every), ()

    def is_place(self, response_ids: Sequence[int]) -> bool:
        """Whether there is one behind these tokens, if more follow."""
        if self.finder is None:
            return len(response_ids) % self.every == 0
        return self.finder.completes(np.asarray(response_ids, dtype=np.int64))

    def settings(self) -> dict[str, Any]:
        """What its scores depend on, as settings.json and results.json have it."""
        place = {"every": self.every} if self.finder is None else {"delimiter": self.delimiter}
        rule = self.rule
        return place | {
            "token_ids": list(rule.token_ids),
            "kind": rule.kind,
            "ref_logprob": rule.ref_logprob,
            "beta": rule.beta,
            "targets": list(rule.targets),
        }


@dataclass(frozen=True, slots=True)
class AskedPrefixes:
    """Of the command line: places in place of the run's, at most one of the two; `every` 0: no prefixes are scored."""

    every: int | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        """Raises TestTimeError for what is no place."""
        if self.every is not None and self.delimiter is not None:
            raise TestTimeError("--prefix-every and --prefix-delimiter: give one of them")
        if self.every is not None and self.every < 0:
            raise TestTimeError(
                f"--prefix-every {self.every}: expected tokens, or 0 for no scores of prefixes"
            )
        if self.delimiter == "":
            raise TestTimeError("--prefix-delimiter is empty; expected a text such as $'\\n\\n'")


def prefix_rule(
    asked: AskedPrefixes,
    *,
    run: RunConfig | None,
    folder: Path,
    tokenizer: Any,
    vocab_size: int,
    end: ScoreRule,
    given: tuple[int | None, float | None, float | None],
) -> PrefixRule | None:
    """How the prefixes of a model's responses are scored; None: they are not.

    The score is that of the run's first readout of prefixes, or of the first one with places of the kind that was asked
    for; without one the score of the end, which was not trained there.

    Args:
        end: how the end is scored.
        given: score token, c_ref and beta in place of the run's, None where they are the run's. As in the run's
            settings, they are for readouts that have none of their own.

    Raises:
        TestTimeError: they are asked for, and there is no score.
        ConfigError: a token that the tokenizer does not know.
    """
    if asked.every == 0:
        return None
    option = "--prefix-every" if asked.every is not None else "--prefix-delimiter"
    is_asked = asked.every is not None or asked.delimiter is not None
    if not end.token_ids:
        if is_asked:
            raise TestTimeError(f"{option}: prefixes are scored with the score token; give --score-token")
        return None
    wanted = {True: "every", False: "delimiter"}[asked.every is not None] if is_asked else None
    found = _readout_of_prefixes(run, wanted)
    if found is None and not is_asked:
        return None
    rule = replace(end, before_end=False) if found is None else _rule(*found, folder, end, given)
    if not rule.makes_scores:
        if is_asked:
            raise TestTimeError(f"{option}: no reference log-prob is known; give --ref-logprob")
        logger.warning("scores of prefixes are left out: no reference log-prob is known; give --ref-logprob")
        return None
    for value in rule.token_ids:
        if not 0 <= value < vocab_size:
            raise TestTimeError(
                f"token id {value} of the readout of prefixes is not in the model's vocabulary of {vocab_size}"
            )
    every, delimiter = asked.every or 0, asked.delimiter or ""
    if found is not None and not is_asked:
        every, delimiter = found[1].every, found[1].delimiter
    finder = Delimiter.of_tokenizer(delimiter, tokenizer, vocab_size) if delimiter else None
    if finder is not None and not finder.last_tokens:
        raise TestTimeError(
            f"the delimiter {delimiter!r} can be in no response: no token ends with a part of it"
        )
    return PrefixRule(rule, every, delimiter, "" if found is None else found[1].name, finder)


def _readout_of_prefixes(run: RunConfig | None, wanted: str | None) -> tuple[ReadoutConfig, Readout] | None:
    if run is None or not run.laser.readouts:
        return None
    pairs = zip(run.laser.readouts, readouts(run), strict=False)  # no readouts without LaSeR
    of_prefixes = [pair for pair in pairs if pair[1].position in ("every", "delimiter")]
    of_kind = [pair for pair in of_prefixes if pair[1].position == wanted]
    return next(iter([*of_kind, *of_prefixes]), None)


def _rule(
    entry: ReadoutConfig,
    readout: Readout,
    folder: Path,
    end: ScoreRule,
    given: tuple[int | None, float | None, float | None],
) -> ScoreRule:
    token, ref_logprob, beta = given
    tokens: tuple[int | str, ...] = readout.tokens
    if entry.tokens is None and (token is not None or not tokens):
        tokens = end.token_ids[:1]
    if readout.score == "scaled_logratio":  # a second one is for its loss alone
        tokens = tokens[:1]
    return ScoreRule(
        tuple(token_id(folder, each) for each in tokens),
        readout.ref_logprob if entry.ref_logprob is not None or ref_logprob is None else ref_logprob,
        readout.beta if entry.beta is not None or beta is None else beta,
        readout.targets,
        readout.score,
    )
