"""What a run says at its start: model, data, layout, settings, what is resumed and what has changed since.

`start_facts` gathers plain values, which also go into events.jsonl; `banner_lines` makes lines of them. Both are pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_laser.config import Architecture, RunConfig, count_parameters
from megatron_laser.config.derived import data_sources
from megatron_laser.run.settings_words import count, labelled, listed, plain_value, settings_in_words

_MOST = 8  # of changes, files and servers that are named


@dataclass(frozen=True)
class SplitFacts:
    """A split of the data.

    problems: that are used. read: rows of the files. too_long: of these, prompts over `data.max_prompt_tokens`.
    sources, shares: problems, and share of the prompts, of each source where there are several.
    """

    split: str
    files: list[str]
    problems: int
    read: int
    too_long: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was at the run's last start.

    kind: learning, running, or "" where it is not recorded; step: the first one with it, None where not recorded.
    """

    key: str
    before: Any
    now: Any
    kind: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Resumed:
    """What the run goes on from.

    Attributes:
        step: of the checkpoint. path: of its folder. converted: it was made of a Hugging Face folder by `convert`.
        done_before: the last step that metrics.jsonl had before, 0 without one: those after `step` are done again.
        passed_over: what was found besides and not used, each in words with the reason.
        branched_from: the run and step that this one was branched from, in words; "" for most.
    """

    step: int
    path: str
    converted: bool = False
    done_before: int = 0
    passed_over: list[str] = field(default_factory=list)
    branched_from: str = ""


@dataclass(frozen=True)
class Earlier:
    """The run's last start: when it began, how it ended, in words. "" where that is not known."""

    started: str = ""
    ended: str = ""


@dataclass(frozen=True)
class StartFacts:
    """Everything that the banner says, as values that JSON can hold; `about` has its lines on the settings."""

    run: str
    folder: str
    steps: int
    parameters: int
    ranks: int
    device: str
    checkpoints: str
    about: dict[str, str]
    data: list[SplitFacts] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)
    resumed: Resumed | None = None
    earlier: Earlier | None = None
    changes: list[Change] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    nothing_saved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For events.jsonl."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """In one sentence, for a list of events."""
        if self.resumed is None:
            begins = f"starts at step 1 of {self.steps}"
        else:
            begins = f"goes on at step {self.resumed.step + 1} of {self.steps}"
        changed = f"; changed: {', '.join(change.key for change in self.changes)}" if self.changes else ""
        return f"{begins} on {count(self.ranks, 'rank')}{changed}"


def start_facts(
    config: RunConfig,
    architecture: Architecture,
    *,
    ranks: int,
    device: str,
    layers: str,
    score_token_id: int | None,
    data: Sequence[SplitFacts],
    servers: Sequence[str] = (),
    resumed: Resumed | None = None,
    earlier: Earlier | None = None,
    changes: Sequence[Change] = (),
    edited: Sequence[str] = (),
    nothing_saved: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> StartFacts:
    """The facts of a start.

    Args:
        layers: what the model's layers are made of, in words.
        servers: their addresses, where servers generate.
        edited: files of the user's code that grades, which are not as the checkpoint had them.
        nothing_saved: without a checkpoint: what was found in its place, and why it is not used.
        notes: what else there is to say of how it begins, a sentence each.
    """
    return StartFacts(
        run=config.run.name,
        folder=str(config.run.output_dir),
        steps=config.run.steps,
        parameters=count_parameters(architecture),
        ranks=ranks,
        device=device,
        checkpoints=str(config.checkpoint.folder or f"{config.run.output_dir}/checkpoints"),
        about=settings_in_words(
            config,
            architecture,
            ranks=ranks,
            device=device,
            layers=layers,
            score_token_id=score_token_id,
            servers=servers,
        ),
        data=list(data),
        servers=list(servers),
        resumed=resumed,
        earlier=earlier,
        changes=list(changes),
        edited=list(edited),
        nothing_saved=list(nothing_saved),
        notes=list(notes),
    )


def split_facts(
    config: RunConfig, split: str, read: int, problems: Iterable[str], most: int | None = None
) -> SplitFacts:
    """Of a split with so many rows `read`; `problems`: the source of each that is used, "" where there is one only.

    Args: most: so many of each source are used at most.
    """
    sources = data_sources(config, split)
    counts = Counter(problems)
    fit = counts.total()
    if most is not None:
        counts = Counter({name: min(found, most) for name, found in counts.items()})
    several = len(sources) > 1
    return SplitFacts(
        split=split,
        files=[str(path) for source in sources for path in source.paths],
        problems=sum(counts.values()),
        read=read,
        too_long=read - fit,
        sources=dict(counts) if several else {},
        shares={source.name: float(source.share) for source in sources}
        if several and split == "train"
        else {},
    )


def banner_lines(facts: StartFacts, width: int | None = None) -> list[str]:
    """The banner; `width`: columns at which lines are broken (None: never, as a log wants it)."""
    told: list[tuple[str, str]] = [("run", f"{facts.run}: {facts.steps} steps, in {facts.folder}")]
    for label, text in facts.about.items():
        told.append((label, text))
        if label == "model":
            told += [("data" if place == 0 else "", _split(one)) for place, one in enumerate(facts.data)]
    told += _start(facts)
    look = f"megatron-laser status {facts.folder}, megatron-laser view {facts.folder}"
    told.append(("look", f"{look}, or {facts.folder}/metrics.jsonl"))
    return labelled(told, width)


def _start(facts: StartFacts) -> list[tuple[str, str]]:
    """Where it begins and why there, and what is not as it was."""
    told = []
    resumed = facts.resumed
    if resumed is None:
        told.append(("start", "at step 1, from the weights of model.path"))
        told += [("not used", text) for text in facts.nothing_saved[:_MOST]]
    else:
        what = "the converted checkpoint" if resumed.converted else "the checkpoint"
        again = ""
        if resumed.done_before > resumed.step:
            first, last = resumed.step + 1, resumed.done_before
            one = first == last
            which = f"step {first} was" if one else f"steps {first} to {last} were"
            again = f"; {which} done before and {'is' if one else 'are'} done again"
        branch = f"; a branch of {resumed.branched_from}" if resumed.branched_from else ""
        told.append(
            ("resumes", f"at step {resumed.step + 1}, from {what} {resumed.path}{again}{branch}"),
        )
        told += [("not used", text) for text in resumed.passed_over[:_MOST]]
    told += [("note", text) for text in facts.notes[:_MOST]]
    earlier = facts.earlier
    if earlier is not None and earlier.ended:
        when = f"began {earlier.started} and " if earlier.started else ""
        told.append(("before", f"the last start {when}{earlier.ended}"))
    for place, change in enumerate(facts.changes[:_MOST]):
        kind = f" ({change.kind})" if change.kind else ""
        since = "" if change.step is None else f", from step {change.step} on"
        text = f"{change.key}: {plain_value(change.before)} -> {plain_value(change.now)}{kind}{since}"
        told.append(("changed" if place == 0 else "", text))
    if (left := len(facts.changes) - _MOST) > 0:
        told.append(("", f"and {left} more settings: see config.yaml"))
    if facts.edited:
        told.append(("edited", f"{listed(facts.edited)}: rewards come from the new code from here on"))
    return told


def _split(facts: SplitFacts) -> str:
    text = f"{facts.split}: {count(facts.problems, 'problem')} of {listed(facts.files)}"
    if facts.sources:
        each = [
            f"{name} {found:,}" + (f" ({facts.shares[name]:.0%} of the prompts)" if facts.shares else "")
            for name, found in facts.sources.items()
        ]
        text += f"; sources {', '.join(each)}"
    if facts.too_long:
        text += f"; {facts.too_long:,} of {facts.read:,} rows left out: prompts over data.max_prompt_tokens"
    if more := facts.read - facts.too_long - facts.problems:
        text += f"; {more:,} more not used: evaluation.max_prompts"
    return text
