"""Token ids with a part in the algorithm, from a folder's JSON files: what ends a response, and the score token.

One rule for dry run and run; no tokenizer is loaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_laser.config.model_folder.architecture import Architecture
from megatron_laser.config.readouts import readout_setting, readouts, score_token_setting
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ScoreToken:
    """What `laser.score_token`, or an entry of `laser.readouts`, names.

    Attributes:
        id: token id; None when the setting is a string and no file says which id it has.
        text: the token; None when no file names the id.
        verified: id and text were found together in the folder's files.
        note: why it is unverified, or what is unusual about it; "" otherwise.
    """

    id: int | None
    text: str | None
    verified: bool
    note: str = ""


@dataclass
class Vocabulary:
    """Tokens named by the folder's files: text -> id, and which of them are special."""

    ids: dict[str, int] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)
    files: list[str] = field(default_factory=list)


def resolve_score_token(
    folder: str | Path,
    token: str | int,
    vocabulary: Vocabulary | None = None,
    *,
    setting: str = "laser.score_token",
) -> ScoreToken:
    """Looks `token` up in tokenizer.json, added_tokens.json, tokenizer_config.json and vocab.json.

    Args:
        vocabulary: what `read_vocabulary` gave for the folder, if it was read already.
        setting: that names the token, for messages.

    Raises:
        ConfigError: the files name the tokens and this string is none of them (near special tokens are
            listed), or one of the files is no valid JSON.
    """
    vocabulary = vocabulary or read_vocabulary(Path(folder))
    if not vocabulary.files:
        note = "the model folder has no tokenizer files"
        if isinstance(token, int):
            return ScoreToken(token, None, False, note)
        return ScoreToken(None, token, False, note)
    if isinstance(token, int):
        texts = [text for text, token_id in vocabulary.ids.items() if token_id == token]
        if not texts:
            return ScoreToken(token, None, False, f"no token has this id in {', '.join(vocabulary.files)}")
        text = texts[0]
    elif token in vocabulary.ids:
        text = token
    else:
        raise ConfigError([_missing(setting, token, vocabulary)], str(folder))
    note = "" if text in vocabulary.special else "not a special token: text may contain it"
    return ScoreToken(vocabulary.ids[text], text, True, note)


def read_stop_token_ids(folder: str | Path) -> tuple[int, ...]:
    """The EOS ids of generation_config.json, else of config.json; empty when neither names any."""
    return next(iter(named_eos_ids(folder).values()), ())


def named_eos_ids(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The EOS ids that each file names, by its name, in the order in which they count; files without any are left out.

    Raises:
        ConfigError: one is no valid JSON, or names something that is no token id.
    """
    found = {}
    for name in ("generation_config.json", "config.json"):
        value = _read_json(Path(folder) / name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError([f"expected an object, got {type(value).__name__}"], str(Path(folder) / name))
        eos = value.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            raise ConfigError(
                [f"eos_token_id: expected a token id or a list of them, got {eos!r}"],
                str(Path(folder) / name),
            )
        if ids:
            found[name] = tuple(ids)
    return found


def _missing(setting: str, token: str, vocabulary: Vocabulary) -> str:
    near = difflib.get_close_matches(token, vocabulary.special, n=3, cutoff=0.4)
    if near:
        hint = f"near special tokens: {_listed(near)}"
    elif vocabulary.special:
        shown = sorted(vocabulary.special)[:8]
        more = ", ..." if len(vocabulary.special) > len(shown) else ""
        hint = f"its special tokens are {_listed(shown)}{more}"
    else:
        hint = "it has no special tokens"
    return f"{setting}: {token!r} is not in the tokenizer ({', '.join(vocabulary.files)}); {hint}"


def _listed(tokens: Iterable[str]) -> str:
    return ", ".join(repr(token) for token in tokens)


def read_vocabulary(folder: Path) -> Vocabulary:
    """Merges the files, those that say which tokens are special first.

    Raises:
        ConfigError: one of them is damaged, or they name no token.
    """
    vocabulary = Vocabulary()
    for name, take in _TOKENS.items():
        content = _read_json(folder / name)
        if content is None:
            continue
        if not isinstance(content, dict):
            raise ConfigError([f"expected an object, got {type(content).__name__}"], str(folder / name))
        try:
            known = take(vocabulary, content)
        except (AttributeError, TypeError, ValueError) as error:
            reason = f"names its tokens in no form that is known ({type(error).__name__}: {error})"
            raise ConfigError([reason], str(folder / name)) from error
        if known:
            vocabulary.files.append(name)
    if vocabulary.files and not vocabulary.ids:
        raise ConfigError(["names no token"], str(folder / vocabulary.files[0]))
    return vocabulary


def _take_tokenizer(vocabulary: Vocabulary, content: dict[str, Any]) -> bool:
    for entry in content.get("added_tokens") or []:
        _add(vocabulary, entry.get("content"), entry.get("id"), bool(entry.get("special")))
    vocab = (content.get("model") or {}).get("vocab")
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
        _take_plain(vocabulary, vocab)
    elif isinstance(vocab, list):  # Unigram: [[text, score], ...]
        for token_id, (text, _) in enumerate(vocab):
            _add(vocabulary, text, token_id, False)
    return True


def _take_settings(vocabulary: Vocabulary, content: dict[str, Any]) -> bool:
    added = content.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return False
    for token_id, entry in added.items():
        _add(vocabulary, entry.get("content"), int(token_id), bool(entry.get("special")))
    return bool(added)


def _take_plain(vocabulary: Vocabulary, content: dict[str, Any]) -> bool:
    for text, token_id in content.items():
        _add(vocabulary, text, token_id, False)
    return True


_TOKENS = {
    "tokenizer.json": _take_tokenizer,
    "tokenizer_config.json": _take_settings,
    "added_tokens.json": _take_plain,
    "vocab.json": _take_plain,
}


def _add(vocabulary: Vocabulary, text: Any, token_id: Any, special: bool) -> None:
    if isinstance(text, str) and isinstance(token_id, int):
        vocabulary.ids.setdefault(text, token_id)
        if special:
            vocabulary.special.add(text)


def _read_json(file: Path) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot be read as JSON: {error}"], str(file)) from error


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """stop_token_ids: what ends a response. score_token: z_c, None where `laser.score_token` names none."""

    stop_token_ids: tuple[int, ...]
    score_token: ScoreToken | None

    @property
    def score_token_id(self) -> int | None:
        """Its id, where it is known."""
        return None if self.score_token is None else self.score_token.id


def resolve_stops(config: RunConfig, architecture: Architecture, *, complete: bool = True) -> tuple[int, ...]:
    """What ends a response: `rollout.stop_token_ids`, else what the model's files name.

    Args:
        complete: the folder is whole, so that what its files do not say is an error; a dry run needs only config.json.

    Raises:
        ConfigError: none is named where the folder is `complete`, or one is not in the vocabulary; has where it stands.
    """
    if config.rollout.stop_token_ids:
        stops = tuple(config.rollout.stop_token_ids)
        _check_vocabulary("rollout.stop_token_ids", stops, architecture.vocab_size)
        return stops
    for name, stops in named_eos_ids(config.model.path).items():
        file = Path(config.model.path) / name
        cure = "; correct it, or set rollout.stop_token_ids"
        _check_vocabulary("eos_token_id", stops, architecture.vocab_size, cure, source=str(file))
        return stops
    if complete:
        raise ConfigError(
            [f"model.path {config.model.path} names no eos_token_id; set rollout.stop_token_ids"]
        )
    return ()


def resolve_score(
    config: RunConfig,
    architecture: Architecture,
    stops: tuple[int, ...],
    *,
    vocabulary: Vocabulary | None = None,
    complete: bool = True,
) -> ScoreToken | None:
    """What `laser.score_token` names; None where it names none.

    Args:
        stops: what ends a response. vocabulary: of the folder's files; read here where it is not given.

    Raises:
        ConfigError: it has no id, one that is not in the vocabulary, or one of `stops`.
    """
    token = score_token_setting(config)
    if token is None:
        return None
    setting = readout_setting(config, 0, "tokens")
    known = resolve_score_token(config.model.path, token, vocabulary, setting=setting)
    needed = config.laser.enabled and complete
    _check_token(setting, token, known, config, architecture, stops, complete=needed)
    return known


@dataclass(frozen=True, slots=True)
class ReadoutToken:
    """A token that a readout reads. readout: its name. setting: where it stands, such as `laser.score_token`."""

    readout: str
    setting: str
    token: ScoreToken

    @property
    def words(self) -> str:
        """For messages: which token, whose, and named where."""
        text = "" if self.token.text is None else f"{self.token.text!r} "
        if self.setting in ("laser.score_token", "--score-token"):
            return f"the score token {text}(id {self.token.id})"
        return f"{text or 'the token '}(id {self.token.id}) of readout {self.readout!r} ({self.setting})"


def resolve_readout_tokens(
    config: RunConfig,
    architecture: Architecture | None,
    stops: tuple[int, ...],
    *,
    folder: Path | None = None,
    vocabulary: Vocabulary | None = None,
    complete: bool = True,
) -> tuple[tuple[ReadoutToken, ...], list[str]]:
    """All tokens of all readouts, in their order, and what is wrong with others, one line each.

    Args:
        architecture: None: unknown, so that ids are not compared with its vocabulary.
        folder: whose tokenizer it is; None: `model.path`. The others: as of `resolve_score`.
    """
    folder = folder or Path(config.model.path)
    found: list[ReadoutToken] = []
    problems: list[str] = []
    # Read once here: a tokenizer's file is large.
    vocabulary = vocabulary or read_vocabulary(folder)
    for index, readout in enumerate(readouts(config)):
        setting, ids = readout_setting(config, index, "tokens"), set[int]()
        for token in readout.tokens:
            try:
                known = resolve_score_token(folder, token, vocabulary, setting=setting)
                _check_token(setting, token, known, config, architecture, stops, complete=complete)
            except ConfigError as error:
                problems += error.problems
                continue
            if known.id in ids:
                problems.append(
                    f"{setting}: {token!r} is id {known.id}, which stands there already; name it once"
                )
            elif known.id is not None:
                ids.add(known.id)
            found.append(ReadoutToken(readout.name, setting, known))
    return tuple(found), problems


def _check_token(
    setting: str,
    token: int | str,
    known: ScoreToken,
    config: RunConfig,
    architecture: Architecture | None,
    stops: tuple[int, ...],
    *,
    complete: bool,
) -> None:
    """Raises ConfigError where it cannot be read: no id (if the folder is `complete`), none of the model's, a stop."""
    if known.id is None:
        if complete:
            raise ConfigError(
                [f"{setting} {token!r} has no id in the tokenizer of {config.model.path}: {known.note}"]
            )
        return
    if architecture is not None:
        _check_vocabulary(setting, (known.id,), architecture.vocab_size)
    if known.id in stops:
        raise ConfigError(
            [
                f"{setting} {token!r} is id {known.id}, which also ends a response (rollout.stop_token_ids "
                f"{list(stops)}); choose an unused special token"
            ]
        )


def _check_vocabulary(
    setting: str, ids: tuple[int, ...], vocab_size: int, cure: str = "", *, source: str = ""
) -> None:
    outside = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if outside:
        raise ConfigError(
            [
                f"{setting}: token id {outside[0]} is not in the model's vocabulary; expected 0 to {vocab_size - 1}"
                f"{cure}"
            ],
            source,
        )
