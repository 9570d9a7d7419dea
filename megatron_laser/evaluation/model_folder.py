"""What test-time commands know of a model: tokenizer, what ends a response, and the score's constants."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_laser.algorithms.readouts import ScoreKind
from megatron_laser.config import (
    ConfigError,
    RunConfig,
    load_config,
    read_architecture,
    read_stop_token_ids,
    resolve_score_token,
)
from megatron_laser.config.model_folder.special_tokens import (
    ReadoutToken,
    ScoreToken,
    resolve_readout_tokens,
)
from megatron_laser.config.readouts import readout_setting, readouts, score_token_setting
from megatron_laser.data import NO_OPTIONS, chat_options
from megatron_laser.data.end_of_response import check_end_of_response, end_sources
from megatron_laser.data.tokenizer import decode_response, load_tokenizer
from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.prefix_rule import AskedPrefixes, PrefixRule, prefix_rule
from megatron_laser.evaluation.score_rule import ScoreRule
from megatron_laser.rewards import reward_rule
from megatron_laser.trainer.checkpoint.best import HF_BEST, LINK
from megatron_laser.trainer.checkpoint.ownership import read_owner

logger = logging.getLogger(__name__)

_EXPORT = "hf"
_CONFIG = "config.yaml"
_MORE_EXPORTS = re.compile(rf"{HF_BEST}|hf_step_\d+")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A Hugging Face folder and how its answers are scored.

    Attributes:
        path: weights and tokenizer.
        vocab_size: ids that the model has. max_positions: tokens that it can read.
        stop_token_ids: what ends a response; only such a response has a score.
        score_token_id: z_c, None without a score. ref_logprob: c_ref in nats. beta: beta_v.
        targets: what right and wrong responses were trained towards, the scale of the score.
        more_tokens, kind, before_end: of the run's first readout, see `ScoreRule`.
        readout_tokens: the score token, and all that the run's other readouts read; none may be in a prompt.
        prefix: how prefixes of responses are scored; None: they are not.
        from_run: settings that its training run decides, by the names of `benchmarks.settings.Benchmark`.
    """

    path: Path
    tokenizer: Any
    vocab_size: int
    max_positions: int
    stop_token_ids: tuple[int, ...]
    score_token_id: int | None
    ref_logprob: float | None
    beta: float
    targets: tuple[float, float] = (1.0, 0.0)
    more_tokens: tuple[int, ...] = ()
    kind: ScoreKind = "scaled_logratio"
    before_end: bool = False
    readout_tokens: tuple[ReadoutToken, ...] = ()
    prefix: PrefixRule | None = None
    from_run: dict[str, Any] = field(default_factory=dict)

    def decode(self, ids: Sequence[int]) -> str:
        """Response ids without the stop token to text."""
        return decode_response(self.tokenizer, ids)

    @property
    def rule(self) -> ScoreRule:
        """How the score is read of an engine."""
        ids = () if self.score_token_id is None else (self.score_token_id, *self.more_tokens)
        return ScoreRule(ids, self.ref_logprob, self.beta, self.targets, self.kind, self.before_end)

    def require_score(self) -> None:
        """Raises TestTimeError unless token and reference of a score are known."""
        if not self.rule.makes_scores:
            missing = "score token" if self.score_token_id is None else "reference log-prob"
            raise TestTimeError(
                f"{self.path}: no {missing} is known; give --score-token, --ref-logprob and --beta as in training, "
                "or name the output folder of the training run (which has them in config.yaml). "
                "`megatron-laser calibrate` measures them for a new model"
            )


def load_model_folder(
    folder: str | Path,
    *,
    score_token: str | int | None = None,
    ref_logprob: float | None = None,
    beta: float | None = None,
    targets: tuple[float, float] | None = None,
    stop_token_ids: Sequence[int] = (),
    with_score: bool = True,
    prefixes: AskedPrefixes | None = None,
) -> ModelFolder:
    """Read what is needed of a Hugging Face folder, or of a training run's output folder (its hf/ and config.yaml).

    RUN/hf_best, RUN/hf_step_N and RUN/checkpoints/best, which means the first, are of their run as well.

    Args:
        score_token, ref_logprob, beta, targets: in place of the run's `laser` section.
        stop_token_ids: in place of the EOS ids of generation_config.json.
        with_score: False: no score, whatever the run says.
        prefixes: which prefixes of responses are scored as well; None: none.

    Raises:
        ConfigError: no model folder, or the score token is not in the tokenizer.
        TestTimeError: the run has no export, or an id does not fit.
    """
    folder, run = _of_a_run(Path(folder))
    architecture = read_architecture(folder)
    setting = tuple(stop_token_ids) or (run.rollout.stop_token_ids if run else None) or ()
    stops = setting or read_stop_token_ids(folder)
    if not stops:
        raise TestTimeError(f"{folder} names no eos_token_id; give --stop-token-id")
    token, setting_of_token = None, "--score-token"
    given = (score_token, ref_logprob, beta)
    if with_score:
        if run is not None and run.laser.enabled:
            if score_token is None:
                score_token = score_token_setting(run)
                setting_of_token = readout_setting(run, 0, "tokens")
            first = readouts(run)[0]
            ref_logprob = first.ref_logprob if ref_logprob is None else ref_logprob
            targets = first.targets if targets is None else targets
            beta = first.beta if beta is None else beta
        beta = run.laser.beta if beta is None and run is not None else beta
        token = None if score_token is None else _score_token(folder, score_token, setting_of_token)
    token_id = None if token is None else token.id
    for name, ids in (("stop token", stops), ("score token", () if token_id is None else (token_id,))):
        for value in ids:
            if not 0 <= value < architecture.vocab_size:
                raise TestTimeError(
                    f"{name} id {value} is not in the model's vocabulary; expected 0 to {architecture.vocab_size - 1}"
                )
    if token_id in stops:
        raise TestTimeError(f"the score token (id {token_id}) also ends responses; expected an unused token")
    if ref_logprob is not None and not ref_logprob < 0:
        raise TestTimeError(f"--ref-logprob {ref_logprob:g}: expected a log-prob, below 0")
    beta = 0.1 if beta is None else beta
    if not beta > 0:
        raise TestTimeError(f"--beta {beta:g}: expected a number above 0 (the paper: 0.1)")
    rule = ScoreRule((), None, beta) if run is None else ScoreRule.of(run, token_id, folder=folder)
    tokenizer = load_tokenizer(folder, ["Is 12 + 35 = 47? \\boxed{1}"])
    through_template = run is not None and run.data.apply_chat_template
    ends = end_sources(
        folder,
        tokenizer,
        setting=setting,
        template_used=through_template,
        name="--stop-token-id",
        options=NO_OPTIONS if run is None else chat_options(run.data),
    )
    if (finding := check_end_of_response(ends, tokenizer)).level == "warning":
        logger.warning("%s", finding.line)
    found = ModelFolder(
        path=folder.absolute(),
        tokenizer=tokenizer,
        vocab_size=architecture.vocab_size,
        max_positions=architecture.max_position_embeddings,
        stop_token_ids=tuple(stops),
        score_token_id=token_id,
        ref_logprob=ref_logprob,
        beta=beta,
        targets=targets or (1.0, 0.0),
        more_tokens=rule.token_ids[1:],
        kind=rule.kind,
        before_end=rule.before_end,
        readout_tokens=() if token is None else _readout_tokens(folder, run, token, setting_of_token),
        from_run=_from_run(run),
    )
    if prefixes is None:
        return found
    of_prefixes = prefix_rule(
        prefixes,
        run=run,
        folder=folder,
        tokenizer=tokenizer,
        vocab_size=architecture.vocab_size,
        end=found.rule,
        given=(None if given[0] is None else token_id, *given[1:]),
    )
    return replace(found, prefix=of_prefixes)


def _of_a_run(folder: Path) -> tuple[Path, RunConfig | None]:
    """The Hugging Face folder that `folder` means, and the settings of the run that it is of, if that is known."""
    if (folder / _CONFIG).is_file() and not (folder / "config.json").is_file():
        run = load_config(folder / _CONFIG)
        if not (folder / _EXPORT / "config.json").is_file():
            raise TestTimeError(
                f"{folder} is a training run without {_EXPORT}/: it is not finished or has checkpoint.export_hf "
                "false. Write a folder with `megatron-laser convert RUN/checkpoints/step_N FOLDER` and name that, "
                "with --score-token, --ref-logprob and --beta"
            )
        return folder / _EXPORT, run
    if folder.name == LINK and (folder / "state.json").is_file():
        owner = read_owner(folder.parent)
        if owner is None:
            raise TestTimeError(
                f"{folder}: nothing beside it says of which run it is; convert it, and name that"
            )
        best = Path(owner.output_dir) / HF_BEST
        if not (best / "config.json").is_file():
            raise TestTimeError(
                f"{best} is not there: it is written when the run has finished. Until then write it with "
                f"`megatron-laser convert {folder} {best}`"
            )
        folder = best
    settings = folder.absolute().parent / _CONFIG
    if _MORE_EXPORTS.fullmatch(folder.name) and (folder / "config.json").is_file() and settings.is_file():
        return folder, load_config(settings)
    return folder, None


def _score_token(folder: Path, given: str | int, setting: str) -> ScoreToken:
    """Of a known id. `setting`: that names it."""
    if isinstance(given, str) and given.isdigit():
        given = int(given)
    token = resolve_score_token(folder, given, setting=setting)
    if token.id is None:
        raise ConfigError([f"{setting}: {given!r}: {token.note}; give its id"], str(folder))
    if token.note:
        logger.warning("score token %r: %s", given, token.note)
    return token


def _readout_tokens(
    folder: Path, run: RunConfig | None, first: ScoreToken, setting: str
) -> tuple[ReadoutToken, ...]:
    """The score token, which `setting` named, and what else the run's readouts read."""
    if run is None or not run.laser.enabled:
        return (ReadoutToken("readout_1", setting, first),)
    # One that the folder does not know is in no prompt.
    all_of_them, _ = resolve_readout_tokens(run, None, (), folder=folder, complete=False)
    name = readouts(run)[0].name
    others = tuple(one for one in all_of_them if one.token.id != first.id)
    if setting == "--score-token":
        replaced = score_token_setting(run)
        others = tuple(
            one
            for one in others
            if one.setting != "laser.score_token"
            and (one.readout != name or replaced not in (one.token.id, one.token.text))
        )
    return (ReadoutToken(name, setting, first), *others)


def _from_run(run: RunConfig | None) -> dict[str, Any]:
    if run is None:
        return {}
    return {
        "prompt_key": run.data.prompt_key,
        "answer_key": run.data.answer_key,
        "prompt_suffix": run.data.prompt_suffix,
        "apply_chat_template": run.data.apply_chat_template,
        "chat_template_arguments": run.data.chat_template_arguments,
        "system_prompt": run.data.system_prompt or "",
        "max_prompt_tokens": run.data.max_prompt_tokens,
        "max_new_tokens": run.evaluation.max_new_tokens or run.rollout.max_new_tokens,
        "temperature": run.evaluation.temperature,
        "top_p": run.evaluation.top_p,
        "seed": run.evaluation.seed,
        "reward": run.reward.function,
        **({} if (rule := reward_rule(run.reward)).is_plain else {"reward_rule": asdict(rule)}),
    }
