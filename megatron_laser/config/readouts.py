"""The readouts of a run, each whole: what `laser.readouts` leaves out is taken from `laser`, once and here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_laser.config.checks.partition_excess import partition_problems
from megatron_laser.config.schema.readouts import ReadoutConfig
from megatron_laser.config.schema.root import RunConfig

PositionKind = Literal["eos", "before_eos", "every", "delimiter", "forced"]

# What an entry leaves out, and the setting of `laser` that it is taken from.
_INHERITED = {
    "tokens": "score_token",
    "weight": "alpha",
    "warmup_steps": "reasoning_warmup_steps",
    "advantages_warmup_steps": "self_reward_warmup_steps",
} | {
    name: name
    for name in (
        "beta",
        "class_weights",
        "loss",
        "ref_logprob",
        "std_threshold",
        "targets",
        "tau",
        "unscored",
    )
}


@dataclass(frozen=True, slots=True)
class Readout:
    """One entry of `laser.readouts` with everything filled in; the settings' docstrings say what they mean.

    every, delimiter, forced: of the positions of these names. gamma: of the target `group_shrunk`. first_step,
    advantages_first_step: from 1; None where the loss has no weight, or advantages stay as they are.
    """

    name: str
    tokens: tuple[int | str, ...]
    position: PositionKind
    every: int
    delimiter: str
    forced: str
    score: Literal["scaled_logratio", "pair_sigmoid", "normalised"]
    beta: float
    ref_logprob: float | None
    reference: Literal["constant", "model"]
    target: Literal["binary", "group_shrunk", "prefix_value"]
    gamma: float
    targets: tuple[float, float]
    loss: Literal["mse", "brier", "bce", "margin"]
    margin: float
    weight: float
    class_weights: bool
    first_step: int | None
    advantages: str
    advantages_first_step: int | None
    tau: float
    std_threshold: float
    unscored: Literal["zero", "exclude"]
    kappa: float
    discrepancy_bounds: tuple[float, float]

    @property
    def of_finished(self) -> bool:
        """One score for each response that ended by itself: what can be the response's score, and change advantages."""
        return self.position in ("eos", "before_eos")

    @property
    def of_responses(self) -> bool:
        """At most one score for each response; else scores of prefixes, as many as there are places."""
        return self.of_finished or self.position == "forced"

    @property
    def joins_tokens(self) -> bool:
        """Whether score or loss of one place need the log-probs of several tokens at once."""
        return len(self.tokens) > 1

    def trains(self, step: int) -> bool:
        """Whether its loss is part of the step's."""
        return self.first_step is not None and step >= self.first_step

    def changes_advantages(self, step: int) -> bool:
        """Whether its scores are used in the step's advantages."""
        return self.advantages_first_step is not None and step >= self.advantages_first_step


def readouts(config: RunConfig) -> tuple[Readout, ...]:
    """All readouts, the response's score first; () without LaSeR."""
    laser = config.laser
    if not laser.enabled:
        return ()
    entries = laser.readouts or (ReadoutConfig(),)
    return tuple(_whole(config, entry, index) for index, entry in enumerate(entries))


def forced_text(config: RunConfig) -> str:
    """What is put behind responses that were cut off, for readouts to read there; "" where none does."""
    return next((readout.forced for readout in readouts(config) if readout.forced), "")


def score_token_setting(config: RunConfig) -> int | str | None:
    """The first token of the response's score, as the settings have it."""
    entries = config.laser.readouts
    if entries and entries[0].tokens:
        return entries[0].tokens[0]
    return config.laser.score_token


def readout_setting(config: RunConfig, index: int, name: str) -> str:
    """Where the user wrote what the readout `index` has for `name`, a field of `ReadoutConfig`: messages name it.

    `laser.readouts[1].beta`, or `laser.beta` where that entry leaves it out; where neither has it, `laser`'s.
    """
    entries = config.laser.readouts
    inherited = _INHERITED.get(name)
    if entries and (inherited is None or getattr(entries[index], name) is not None):
        return f"laser.readouts[{index}].{name}"
    return f"laser.{inherited or name}"


def _whole(config: RunConfig, entry: ReadoutConfig, index: int) -> Readout:
    laser = config.laser
    position, place = _choice(entry.position, "eos")
    target, gamma = _choice(entry.target, "binary")
    weight = laser.alpha if entry.weight is None else entry.weight
    warmup = laser.reasoning_warmup_steps if entry.warmup_steps is None else entry.warmup_steps
    more = (
        laser.self_reward_warmup_steps
        if entry.advantages_warmup_steps is None
        else entry.advantages_warmup_steps
    )
    advantages = entry.advantages or ("mix" if index == 0 else "none")
    tau = laser.tau if entry.tau is None else entry.tau
    unused = advantages == "none" or (advantages == "mix" and tau == 0)
    tokens = entry.tokens or (() if laser.score_token is None else (laser.score_token,))
    return Readout(
        name=entry.name or f"readout_{index + 1}",
        tokens=tokens,
        position=position,  # type: ignore[arg-type]
        every=place if isinstance(place, int) else 0,
        delimiter=place if position == "delimiter" and isinstance(place, str) else "",
        forced=place if position == "forced" and isinstance(place, str) else "",
        score=entry.score,
        beta=laser.beta if entry.beta is None else entry.beta,
        ref_logprob=laser.ref_logprob if entry.ref_logprob is None else entry.ref_logprob,
        reference=laser.reference,
        target=target,  # type: ignore[arg-type]
        gamma=gamma if isinstance(gamma, float) else 1.0,
        targets=laser.targets if entry.targets is None else entry.targets,
        loss=entry.loss or laser.loss,
        margin=entry.margin,
        weight=weight,
        class_weights=laser.class_weights if entry.class_weights is None else entry.class_weights,
        first_step=None if weight == 0 else warmup + 1,
        advantages=advantages,
        advantages_first_step=None if unused else warmup + more + 1,
        tau=tau,
        std_threshold=laser.std_threshold if entry.std_threshold is None else entry.std_threshold,
        unscored=entry.unscored or laser.unscored,
        kappa=entry.kappa,
        discrepancy_bounds=entry.discrepancy_bounds,
    )


def _choice(value: object, default: str) -> tuple[str, object]:
    """(name, its value or None) of a setting that is a name or a table of one entry."""
    if isinstance(value, dict):
        (name, inner), *_ = value.items()
        return str(name), inner
    return str(value or default), None


def readout_problems(config: RunConfig) -> list[str]:
    """What cannot be read, or would not mean what it says; one line each."""
    laser = config.laser
    if not laser.enabled:
        return []
    found = readouts(config)
    problems = []
    if laser.readouts is None:
        if laser.score_token is None:
            problems.append(
                "laser.score_token: required while laser.enabled is true; name an unused special token of the "
                "tokenizer, such as '<|vision_start|>' for Qwen2.5"
            )
    else:
        names = [readout.name for readout in found]
        if len(set(names)) < len(names):
            problems.append(f"laser.readouts: names are {', '.join(names)}; each may be there once")
        if not found[0].of_finished:
            cure = ""
            if found[0].position == "forced":
                cure = ", which finished responses have; put another entry before it, such as {}"
            problems.append(
                f"laser.readouts[0].position: {found[0].position}; the first readout is the response's score: eos or "
                f"before_eos{cure}"
            )
        problems += _forced_problems(found)
    for index in range(len(found)):
        problems += _problems_of(index, found[index], config)
    if laser.score_source == "server" and (
        len(found) > 1 or found[0].joins_tokens or found[0].position != "eos"
    ):
        problems.append(
            "laser.score_source: server with laser.readouts of more than one token behind the end; servers return "
            "that one alone: use trainer"
        )
    # What `laser` has for several readouts is said once.
    return list(dict.fromkeys(problems))


def _forced_problems(found: tuple[Readout, ...]) -> list[str]:
    forced = [(f"laser.readouts[{index}]", one) for index, one in enumerate(found) if one.forced]
    problems = [
        f"{place}.target: prefix_value with position forced; no other response goes on with the text: binary or "
        "{group_shrunk: gamma}"
        for place, readout in forced
        if readout.target == "prefix_value"
    ]
    texts = list(dict.fromkeys(readout.forced for _, readout in forced))
    if len(texts) > 1:
        place = next(place for place, readout in forced if readout.forced == texts[1])
        problems.append(
            f"{place}.position: forced {texts[1]!r}, and {forced[0][0]} has {texts[0]!r}; a response goes on in one "
            "way: give all of them the same text"
        )
    return problems


def _problems_of(index: int, readout: Readout, config: RunConfig) -> list[str]:
    def of(name: str) -> str:
        return readout_setting(config, index, name)

    listed = config.laser.readouts is not None
    here = f"laser.readouts[{index}]" if listed else "laser"
    problems = _token_problems(index, readout, config) if listed else []
    if readout.score == "scaled_logratio" and readout.ref_logprob is None and readout.reference == "constant":
        also = "; laser.ref_logprob is for all entries that have none" if listed else ""
        problems.append(
            f"{here}.ref_logprob: required while laser.enabled is true and laser.reference is constant; it is "
            f"the mean log-prob of the score token after the initial model's responses (Qwen2.5: -23.0){also}"
        )
    right, wrong = readout.targets
    targets, loss = of("targets"), of("loss")
    if right <= wrong:
        problems.append(
            f"{targets}: [right, wrong] = [{right:g}, {wrong:g}]; right must be greater than wrong"
        )
    elif readout.score != "scaled_logratio" and not (wrong >= 0.0 and right <= 1.0):
        problems.append(
            f"{targets}: [{right:g}, {wrong:g}] with score {readout.score}, a share of probability, which is "
            f"never outside 0 to 1; give {here}.targets within it, such as [1, 0]"
        )
    elif readout.loss in ("bce", "brier") and readout.targets != (1.0, 0.0):
        problems.append(
            f"{targets}: [{right:g}, {wrong:g}] with {loss} {readout.loss}, whose labels are always "
            f"[1.0, 0.0]; remove {targets} or set {loss} to mse"
        )
    if readout.advantages != "none" and not readout.of_finished:
        scores = "scores behind a forced text" if readout.forced else "scores of prefixes"
        problems.append(
            f"{of('advantages')}: {readout.advantages} with position {readout.position}; {scores} change no "
            "advantages: none"
        )
    low, high = readout.discrepancy_bounds
    if not 0.0 <= low <= 1.0 <= high:
        problems.append(f"{of('discrepancy_bounds')}: [{low:g}, {high:g}]; expected 0 <= low <= 1 <= high")
    # With reference: model the constant is only an estimate, but checked where it is given.
    if (
        readout.score == "scaled_logratio"
        and readout.ref_logprob is not None
        and right > 0
        and not config.laser.allow_partition_excess
    ):
        problems += partition_problems(
            (of("ref_logprob"), readout.ref_logprob), (of("beta"), readout.beta), right
        )
    return problems


def _token_problems(index: int, readout: Readout, config: RunConfig) -> list[str]:
    """Of a listed readout: as many tokens as score and loss use."""
    count, setting = len(readout.tokens), readout_setting(config, index, "tokens")
    here = f"laser.readouts[{index}]"
    least, most = {"scaled_logratio": (1, 2), "pair_sigmoid": (2, 2), "normalised": (2, 64)}[readout.score]
    if not least <= count <= most:
        reads = f"{least}" if least == most else f"{least} to {most}"
        if count and setting != f"{here}.tokens":
            return [
                f"{here}.score: {readout.score} reads {reads} tokens, and {setting} is one; name unused special "
                f"tokens as {here}.tokens"
            ]
        return [
            f"{here}.tokens: {count} with score {readout.score}, which reads {reads}; name unused special "
            "tokens here, or one as laser.score_token"
        ]
    if count == 2 and readout.score == "scaled_logratio" and readout.loss != "bce":
        loss = readout_setting(config, index, "loss")
        return [
            f"{here}.tokens: two with score scaled_logratio and {loss} {readout.loss}, which use the first alone; "
            f"name one, or take {here}.loss bce (Eq. 16) or {here}.score pair_sigmoid"
        ]
    return []
