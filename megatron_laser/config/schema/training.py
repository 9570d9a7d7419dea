"""Sections that say what is optimized: LaSeR, the policy loss and the optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_laser.config.schema.fields import (
    LEARNING,
    AboveOne,
    ClipLow,
    Count,
    CountOrZero,
    DecayPair,
    Fraction,
    FunctionName,
    LogProb,
    NonNegative,
    NumberPair,
    Positive,
    Running,
    ScoreTokenSetting,
    Section,
    Switch,
    identity,
)
from megatron_laser.config.schema.readouts import OTHER_SCORE, Readouts

_OTHER_ROUTERS = identity("a checkpoint has an optimizer state of the routers, or none")


class LaserConfig(Section):
    """Last-token self-rewarding (arXiv 2510.14943): score = beta * (zc_logprob - ref_logprob)."""

    changing = LEARNING

    enabled: bool = True
    """false: plain GRPO; no score is computed."""
    score_token: Annotated[ScoreTokenSetting, OTHER_SCORE] = None
    """The score token z_c, an unused special token, as a string or an id (Qwen2.5: `<|vision_start|>`).
    Required when enabled."""
    score_source: Literal["trainer", "server"] = "trainer"
    """Who computes the old policy's zc_logprob for advantages and metrics: the `trainer` in its log-prob
    pass, or the `server`, that is the rollout engine, as one more token behind each response."""
    ref_logprob: Annotated[LogProb | None, OTHER_SCORE] = None
    """c_ref: mean of log pi_ref(z_c | prompt, response, EOS) over responses of the initial model, in nats
    (Qwen2.5: -23.0). Required when enabled, unless `reference: model`."""
    beta: Annotated[Positive, OTHER_SCORE] = 0.1
    """beta_v: one unit of score is 1/beta nats of zc_logprob."""
    alpha: NonNegative = 0.1
    """Weight of the self-reward loss in the total loss."""
    tau: Fraction = 0.1
    """Share of the self-reward advantage: A = (1 - tau) * verifier's + tau * self-reward's."""
    std_threshold: NonNegative = 0.1
    """A group whose scores (clamped to [0, 1]) have a standard deviation of at most this keeps the
    verifier's advantages."""
    reasoning_warmup_steps: CountOrZero = 200
    """Steps of plain RL first; the self-reward loss starts at the step after them."""
    self_reward_warmup_steps: CountOrZero = 200
    """Further steps before self-reward advantages are mixed in."""
    unscored: Literal["zero", "exclude"] = "zero"
    """A response without a score counts as score 0 in its group (`zero`) or is left out of the group's
    statistics and keeps the verifier's advantage (`exclude`)."""
    max_unscored_steps: Running[Count | None] = 10
    """So many steps in a row without a single response that ends by itself, and so has a score, stop the run with the
    likely cause; all steps of a shorter run do, too. null: it goes on, and says so once."""
    class_weights: bool = True
    """Weight right and wrong responses so that both classes count half of the loss each."""
    targets: Annotated[NumberPair, OTHER_SCORE] = (1.0, 0.0)
    """beta * (zc_logprob - ref_logprob) that right and wrong responses are trained towards: [right, wrong]. Every
    score that is used or shown is on their scale: 1 at the right one and 0 at the wrong one."""
    loss: Annotated[Literal["mse", "bce"], OTHER_SCORE] = "mse"
    """`mse` on the score; `bce`, cross-entropy on z_c, is an ablation known to hurt."""
    reference: Annotated[Literal["constant", "model"], OTHER_SCORE] = "constant"
    """What the score is measured from: the `constant` ref_logprob, or (ablation) each response's
    zc_logprob under a frozen copy of the initial `model`, which must then be loaded."""
    readouts: Readouts | None = None
    """Several readouts, or one of another kind: a list of tables, whose keys are below. What an entry leaves out is as
    the settings above have it; null: one entry with nothing in it, which is LaSeR as published."""
    drift_every: Running[CountOrZero] = 0
    """Every so many steps, and after the last one, measure log pi(z_c) of the trained weights on the same held
    responses, and where there is a reference model how far its own is from c_ref (metrics `drift/...`); 0: off."""
    drift_samples: Running[Count] = 128
    """So many scored responses, in whole groups, are held for it: of the first step's rollouts, that is of the initial
    model. They are in `held_responses.npz` of the output folder; each measurement is a forward pass over them."""
    allow_partition_excess: Running[bool] = False
    """Run although Z - 1 > 0.05, that is although the score of right responses asks for a probability of
    z_c that disturbs the policy."""


class PolicyConfig(Section):
    """The policy-gradient part: advantages, importance ratios and the loss."""

    changing = LEARNING

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] | FunctionName = "grpo"
    """Advantage estimator: `grpo`, (reward - group mean) / (group std + 1e-6); `dr_grpo`, reward - group
    mean; `rloo`, reward - mean of the group's other responses; `reinforce_pp`, (reward - group mean)
    normalised over the whole rollout batch, the only one for groups of one (then without a group mean); or a function
    of yours, `path/to/file.py:function`, that takes an `AdvantageBatch` (docs/objectives.md) and may be for groups of
    one, too."""
    advantage_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of such a function."""
    loss: Literal["ppo", "gspo", "cispo", "gmpo", "sapo"] | FunctionName = "ppo"
    """What a token's loss is: `ppo`, the clipped surrogate; `gspo`, the same on the ratio of whole responses; `cispo`,
    the clipped ratio as a weight without gradient; `gmpo`, the geometric mean of clipped ratios; `sapo`, a soft gate in
    place of the clip; or a function of yours, `path/to/file.py:function`, that takes `PolicyRows`
    (docs/objectives.md)."""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of it beside `clip_low`, `clip_high` and `dual_clip`: `sapo` has tau_positive, 1.0, and
    tau_negative, 1.05."""
    normalize_std: bool = True
    """`grpo` only: divide by the group's standard deviation; false is `dr_grpo`. Refused with a function of yours,
    which has `advantage_options`."""
    old_logprobs: Literal["recompute", "on_policy", "rollout"] = "recompute"
    """Old policy's log-probs in the ratio: `recompute`d by the trainer before the update; `on_policy`, the
    current forward's, detached (one optimizer step per rollout batch); `rollout`, the engine's."""
    clip_low: ClipLow = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped from above at 1 + clip_high; more than `clip_low`: clip-higher (DAPO)."""
    dual_clip: AboveOne | None = None
    """Bound, above 1, of the loss where the advantage is negative: at least dual_clip * advantage (dual-clip
    PPO); null: off. Only of `loss: ppo`."""
    importance_cap: Positive | None = None
    """Truncated importance sampling (TIS): weight tokens by min(pi_old_trainer / pi_rollout, cap), detached;
    null: off. Not with `old_logprobs: rollout`, where that ratio is part of the loss already."""
    importance_mask: NumberPair | None = None
    """Masked importance sampling, [low, high]: tokens whose pi_old_trainer / pi_rollout is outside take no part in
    the policy loss and are counted (`importance_masked_fraction`); null: off. Not with `old_logprobs: rollout`."""
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    """What the ratio of `importance_cap` and `importance_mask` is taken of: each `token`; its whole response
    (`sequence`: the product of its tokens' ratios, unbiased, and wide for long responses); or the `geometric` mean of
    these. With the last two a response is weighted, or left out, as a whole."""
    overlong_buffer: Count | None = None
    """Soft overlong punishment (DAPO): within so many tokens of `rollout.max_new_tokens` the reward that advantages are
    made of falls linearly by up to `overlong_penalty`, which a response that was cut off loses whole; the label that
    the score is trained with stays. null: off."""
    overlong_penalty: NonNegative = 1.0
    """See `overlong_buffer`."""
    length_penalty: NonNegative = 0.0
    """Weight of Kimi k1.5's length reward in the advantages' reward: within a group, short right responses gain up to
    half of it, and long ones lose as much, wrong ones too; 0: off."""
    mismatch_abort: Running[Positive | None] = None
    """Stop the run when a step's mean |trainer - engine| log-prob (`logprob_diff_mean`) is more than this many
    nats: the engine then samples from another policy than the one that is trained; null: off."""
    kl_coefficient: NonNegative = 0.0
    """Weight of the KL to the initial model; above 0 a reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator (Schulman): k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r."""
    entropy_coefficient: NonNegative = 0.0
    """Weight of the entropy bonus."""
    loss_aggregation: Literal[
        "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"
    ] = "token_mean"
    """How token losses become one number: mean over all tokens; mean over responses of their token mean;
    mean over responses of their token sum; or the sum over tokens / (responses * max_new_tokens), as in
    Dr. GRPO."""
    minibatches: Count = 1
    """Optimizer steps per pass over a rollout batch; must divide `rollout.prompts_per_step`."""
    epochs: Count = 1
    """Passes over a rollout batch."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    changing = LEARNING

    lr: NonNegative = 1e-6
    """Peak learning rate."""
    betas: DecayPair = (0.9, 0.999)
    """Decay of the first and second moments, each in [0, 1)."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to min_lr at the run's last optimizer step."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps in which the learning rate rises linearly from 0."""
    min_lr: NonNegative = 0.0
    """Where a linear or cosine schedule ends."""
    distributed: Running[bool] = False
    """Shard optimizer state over the data-parallel and context ranks (Megatron's distributed optimizer)."""
    offload: Running[bool] = False
    """Keep the optimizer's state in page-locked host memory, and on the GPU only while it updates the weights, when
    activations are gone: the peak is then that of the forward and backward passes or of the update, not of both. The
    same numbers, bit for bit; each optimizer step moves the state there and back."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """How Adam's two moments are kept. `bfloat16` halves them, at 8 bits of precision: with Transformer Engine's
    optimizer, `distributed` and `model.dtype: bfloat16`. The update itself is computed in float32."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """In what gradients are summed over micro-batches and reduced over ranks. `bfloat16` halves their memory and
    traffic and rounds every sum to 8 bits: a small batch's contribution can be lost. Needs `model.dtype: bfloat16`."""
    overlap_grad_reduce: Running[bool] = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: Running[bool] = False
    """Gather updated parameters during the next forward pass; needs `distributed` and
    `overlap_grad_reduce`."""
    gradient_accumulation_fusion: Running[Annotated[Literal["auto", "on", "off"], Switch]] = "auto"
    """Add weight gradients to their float32 sums inside the matrix product that makes them, unrounded: `auto`, on
    CUDA where Transformer Engine or apex's extension is there; `on`, or an error; `off`, a gradient in
    `model.dtype` first. The log-prob head always adds its own."""


class MoeConfig(Section):
    """Routers of a mixture-of-experts model. A dense model has none, and takes no setting from here."""

    changing = LEARNING

    aux_loss_coefficient: NonNegative = 0.0
    """Weight of the load-balancing loss, which is 1 for each layer when all experts get as many tokens. It is of all
    tokens of an optimizer step, not of each micro-batch, and needs a pass before the update to count them: the
    old-policy pass, or one more where there is none."""
    z_loss_coefficient: NonNegative = 0.0
    """Weight of the mean squared log-sum-exp of each router's logits, which keeps them small."""
    freeze_router: Annotated[bool, _OTHER_ROUTERS] = False
    """Routers keep the weights of `model.path`."""
    routing_replay: bool = False
    """Send each token, in the old-policy pass and in training, to the experts that the rollout engine chose for it (R3,
    arXiv 2510.11370), so that both compute with the same ones. SGLang servers must be started for it
    (--enable-return-routed-experts, which `serve` does); tokens for which an engine gives none are routed anew."""
