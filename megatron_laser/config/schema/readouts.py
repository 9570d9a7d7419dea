"""`laser.readouts`: what is read of the policy, where, and what it trains. One entry is one readout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_laser.config.schema.fields import (
    LEARNING,
    CountOrZero,
    Fraction,
    FunctionName,
    LogProb,
    NonNegative,
    NumberPair,
    Positive,
    Running,
    Section,
    Text,
    identity,
)


def _tokens(value: Any) -> Any:
    if value is None:
        return None
    tokens = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not tokens or any(token is None for token in tokens) or len(set(tokens)) < len(tokens):
        raise ValueError("expected one token, or a list of different ones, such as ['<|yes|>', '<|no|>']")
    return tokens


def _choice(names: tuple[str, ...], valued: Mapping[str, type]) -> BeforeValidator:
    """One of `names`, or a table of one entry, {name: value}, of `valued`."""
    words = [*names, *(f"{{{name}: {_WORDS[kind]}}}" for name, kind in valued.items())]

    def check(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value in names):
            return value
        if isinstance(value, dict) and len(value) == 1:
            (name, inner), *_ = value.items()
            wanted = valued.get(name)
            if wanted is str and isinstance(inner, str) and inner:
                return value
            number = float(inner) if isinstance(inner, int | float | str) and _is_number(inner) else None
            if wanted is int and isinstance(inner, int) and not isinstance(inner, bool) and inner >= 1:
                return value
            if (
                wanted is float
                and number is not None
                and not isinstance(inner, bool)
                and 0.0 <= number <= 1.0
            ):
                return {name: number}
        raise ValueError(f"expected {', '.join(words[:-1])} or {words[-1]}")

    return BeforeValidator(check)


_WORDS = {int: "tokens", str: "text", float: "0 to 1"}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


Tokens = Annotated[tuple[int | str, ...] | None, BeforeValidator(_tokens)]
Position = Annotated[
    str | dict[str, int | str] | None,
    _choice(("eos", "before_eos"), {"every": int, "delimiter": str, "forced": str}),
]
Target = Annotated[
    str | dict[str, float] | None, _choice(("binary", "prefix_value"), {"group_shrunk": float})
]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


OTHER_SCORE = identity(
    "the score that was trained is of this token, place and scale; with another all scores would jump",
    branch=True,
)


class ReadoutConfig(Section):
    """What is read of the policy at some places of a response, and what it is trained towards. What an entry leaves
    out is as `laser` has it: an empty one is the readout that `laser`'s own settings describe."""

    changing = LEARNING

    name: Running[Text | None] = None
    """In names of metrics, `readout/<name>/...`; null: `readout_1` for the first entry, and so on. The first is the
    response's score: its metrics have plain names, and votes and evaluations use it."""
    tokens: Annotated[Tokens, OTHER_SCORE] = None
    """Unused special tokens whose log-probs are read: one, or a list; null: `laser.score_token`."""
    position: Annotated[Position, OTHER_SCORE] = None
    """`eos`, behind the token that ended the response; `before_eos`, in the distribution that this token was sampled
    from; `{every: n}`, behind every n-th token; `{delimiter: text}`, behind each token with which such a text is
    complete, as "\\n\\n" ends a paragraph; these two give scores of prefixes, and also read responses that were cut
    off. `{forced: text}` reads those alone, that is what a limit cut off: the text, such as the token that ends a
    response, is put behind each of them for reading only, and the place is behind its last token. Not for the first
    entry, and one text for all that have it. null: `eos`."""
    score: Annotated[Literal["scaled_logratio", "pair_sigmoid", "normalised"], OTHER_SCORE] = (
        "scaled_logratio"
    )
    """How log-probs become a score: `scaled_logratio`, beta * (log-prob of the first token - ref_logprob);
    `pair_sigmoid`, sigmoid of the difference of two log-probs, that is p_1 / (p_1 + p_2); `normalised`, the first
    token's share of the probability of all of them."""
    ref_logprob: Annotated[LogProb | None, OTHER_SCORE] = None
    """As `laser.ref_logprob`, for this place."""
    beta: Annotated[Positive | None, OTHER_SCORE] = None
    """As `laser.beta`."""
    target: Annotated[Target, OTHER_SCORE] = None
    """`binary`, the verifier's label; `{group_shrunk: gamma}`, gamma * label + (1 - gamma) * mean label of the group;
    `prefix_value`, the mean label of the group's responses that begin with the same tokens up to this place; null:
    `binary`."""
    targets: Annotated[NumberPair | None, OTHER_SCORE] = None
    """As `laser.targets`."""
    loss: Annotated[Literal["mse", "brier", "bce", "margin"] | None, OTHER_SCORE] = None
    """`mse`, (score - target)^2; `brier`, (p - target)^2 with p the readout's probability (of the first token, or the
    pair's share); `bce`, cross-entropy of p, and of two tokens with `scaled_logratio` the first one's log-prob for
    right and the second one's for wrong (Eq. 16 of the paper, an ablation); `margin`, how much of `margin` is missing
    between the score and the middle of the targets; null: as `laser.loss`."""
    margin: Positive = 1.0
    """With `loss: margin`: 1 asks for the targets themselves and no more, in halves of the distance between them."""
    weight: NonNegative | None = None
    """Weight of this readout's loss; null: `laser.alpha`."""
    class_weights: bool | None = None
    """As `laser.class_weights`."""
    warmup_steps: CountOrZero | None = None
    """Its loss starts at the step after them; null: `laser.reasoning_warmup_steps`."""
    advantages: Literal["mix", "discrepancy", "none"] | FunctionName | None = None
    """What the score does to advantages: `mix`, as `laser.tau` says; `discrepancy`, responses whose score disagrees
    with the verifier count more (`kappa`); `none`; or a function of yours, `path/to/file.py:function`. Not for scores
    of prefixes, or behind a forced text. null: `mix` for the first entry, `none` for others."""
    advantages_warmup_steps: CountOrZero | None = None
    """Further steps after the loss's before advantages change; null: `laser.self_reward_warmup_steps`."""
    tau: Fraction | None = None
    """As `laser.tau`."""
    std_threshold: NonNegative | None = None
    """As `laser.std_threshold`."""
    unscored: Literal["zero", "exclude"] | None = None
    """As `laser.unscored`."""
    kappa: NonNegative = 1.0
    """With `advantages: discrepancy`: advantages are multiplied by 1 + kappa * (d - mean of d over the group), d =
    |label - score|, within `discrepancy_bounds`."""
    discrepancy_bounds: NumberPair = (0.5, 2.0)
    """Least and largest factor."""


Readouts = Annotated[tuple[ReadoutConfig, ...], BeforeValidator(_listed), Field(min_length=1)]
