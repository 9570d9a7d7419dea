"""What a run optimizes, looked at before anything is built: functions of the user's, tokens and texts of readouts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_laser.config import RunConfig
from megatron_laser.config.derived import longest_sequence
from megatron_laser.config.model_folder.continuation import continuation_problems
from megatron_laser.config.model_folder.special_tokens import ReadoutToken, resolve_readout_tokens
from megatron_laser.config.readouts import forced_text, readout_setting, readouts
from megatron_laser.data.tokenizer import load_tokenizer, text_ids
from megatron_laser.errors import Finding
from megatron_laser.run.preflight.model import ModelInputs
from megatron_laser.user_functions import UserFunctionError, bind, load_function


def objective_findings(config: RunConfig) -> list[Finding]:
    """One for each function of the user's that `policy` and `laser.readouts` name."""
    found = []
    for setting, spec, options in _functions(config):
        try:
            # A loss may also want the clips, which are known.
            known = {} if setting != "policy.loss" else dict.fromkeys(("clip_low", "clip_high", "dual_clip"))
            bind(setting, load_function(setting, spec), 1, known=known, options=options)
        except UserFunctionError as error:
            found.append(Finding("objective", "error", str(error)))
        else:
            found.append(Finding("objective", "ok", f"{setting}: {spec}"))
    return found


def _functions(config: RunConfig) -> Iterator[tuple[str, str, dict[str, object]]]:
    policy = config.policy
    if ":" in policy.loss:
        yield "policy.loss", policy.loss, policy.loss_options
    if ":" in policy.advantage:
        yield "policy.advantage", policy.advantage, policy.advantage_options
    for index, readout in enumerate(readouts(config)):
        if ":" in readout.advantages:
            yield f"laser.readouts[{index}].advantages", readout.advantages, {}


def readout_findings(config: RunConfig, model: ModelInputs) -> list[Finding]:
    """What is wrong with the tokens of `laser.readouts`, or unusual; `model` keeps what they came to.

    Nothing is said of `laser.score_token`, which is looked at with the model.
    """
    if model.score_token is None and model.special is None:
        return []  # what it needs was not found, which is said by now
    stops = () if model.special is None else model.special.stop_token_ids
    model.readout_tokens, problems = resolve_readout_tokens(
        config, model.architecture, stops, vocabulary=model.vocabulary
    )
    if not config.laser.enabled and model.score_token is not None:
        # Nothing reads it; but data with the token in it would be no data for LaSeR, to which such runs are compared.
        name = readout_setting(config, 0, "tokens")
        model.readout_tokens = (ReadoutToken("readout_1", name, model.score_token),)
    if config.laser.readouts is None:
        return []
    found = [Finding("readouts", "error", problem) for problem in problems]
    # The first one of the first is looked at with the model, too.
    others = [one for one in model.readout_tokens[1:] if one.setting != "laser.score_token"]
    return found + [
        Finding("readouts", "warning", f"{one.words}: {one.token.note}") for one in others if one.token.note
    ]


def forced_findings(config: RunConfig, model: ModelInputs) -> list[Finding]:
    """What the text that readouts force behind responses is as tokens, and why it cannot be; nothing without one.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    text = forced_text(config)
    if not text or model.architecture is None or model.special is None:
        return []
    tokenizer = load_tokenizer(config.model.path, [text])
    ids = text_ids(tokenizer, text)
    read = {one.token.id for one in model.readout_tokens if one.token.id is not None}
    problems = continuation_problems(config, model.architecture, ids, read)
    if problems:
        return [Finding("readouts", "error", problem) for problem in problems]
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    words = f"position forced: {text!r} is {len(ids)} token{'s' if len(ids) > 1 else ''}, {pieces}"
    longest, limit = longest_sequence(config) + len(ids), model.architecture.max_position_embeddings
    found = [
        Finding(
            "readouts",
            "ok",
            f"{words}; behind a response that was cut off it ends at {longest:,} tokens at most, and the model has "
            f"{limit:,} positions",
        )
    ]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids:
        found.append(
            Finding(
                "readouts",
                "warning",
                f"position forced: a part of {text!r} is unknown to the tokenizer",
                cure="take a text that it has tokens for",
            )
        )
    elif ids[-1] not in model.special.stop_token_ids:
        found.append(
            Finding(
                "readouts",
                "note",
                f"position forced: {text!r} does not end with a token that ends a response "
                f"({list(model.special.stop_token_ids)}), as finished responses do",
            )
        )
    return found
