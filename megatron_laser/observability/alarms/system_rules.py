"""Alarms of what training runs on: engine against trainer, c_ref, gradients, grading, servers, ranks, time."""

from __future__ import annotations

from megatron_laser.observability.alarms import judges
from megatron_laser.observability.alarms.rule import CHECK, FEW_MEASUREMENTS, QUICK, REPORT, Rule

SYSTEM_RULES: tuple[Rule, ...] = (
    Rule(
        "mismatch",
        "engine and trainer disagree",
        "mean difference of log-probs in nats",
        ".3g",
        ("logprob_diff_mean", "logprob_diff_max", "rollout_k3_kl"),
        "The engine samples from other probabilities than the trainer computes: another dtype or temperature, a sync "
        "that did not arrive, kernels that differ; with rollout.ahead also tokens of older weights. "
        "policy.importance_cap corrects for it, up to a point.",
        "scaling.md#precision",
        "megatron-laser env",
        lambda limit, settings: judges.above(judges.metric("logprob_diff_mean"), limit),
    ),
    Rule(
        "mismatch_kl",
        "engine and trainer disagree",
        "KL between engine and trainer in nats",
        ".3g",
        ("rollout_k3_kl", "logprob_diff_mean"),
        "As `mismatch`; this estimate is led by the tokens on which they differ most.",
        "scaling.md#precision",
        "megatron-laser env",
        lambda limit, settings: judges.above(judges.metric("rollout_k3_kl"), limit),
    ),
    Rule(
        "mismatch_growth",
        "engine and trainer drift apart",
        "mean difference of log-probs in nats",
        ".3g",
        ("logprob_diff_mean", "rollout_k3_kl", "staleness_mean"),
        "The difference of log-probs is several times what it was: weight syncs that lose something "
        "(rollout.verify_sync looks), FP8 ranges that no longer fit, or a policy that has moved to tokens on which the "
        "two differ.",
        "scaling.md#precision",
        "megatron-laser env",
        lambda limit, settings: judges.grown(
            judges.metric("logprob_diff_mean"), limit, settings.early_steps, judges.SMALL_MISMATCH
        ),
    ),
    Rule(
        "c_ref_drift",
        "the constant c_ref is off",
        "distance of the reference model's mean from c_ref in nats",
        ".2f",
        ("drift/reference_mean", "drift/reference_std"),
        "log pi_ref(z_c) behind the policy's responses has left the constant, so that scores are off by laser.beta "
        "times this: measure c_ref anew, or laser.reference: model.",
        "algorithm.md#does-c_ref-still-hold",
        "megatron-laser calibrate",
        lambda limit, settings: judges.above(judges.distance(judges.metric("drift/reference_mean")), limit),
        lambda limit, settings: FEW_MEASUREMENTS,
        "measurements",
    ),
    Rule(
        "uniform_groups",
        "nothing to learn",
        "share of groups with one reward for all",
        ".0%",
        ("groups_uniform_fraction", "groups_dropped", "reward_mean"),
        "Nearly all groups are all right or all wrong, and have no advantage: the data is too easy or too hard for "
        "this policy by now. Other data, more rollout.samples_per_prompt, rollout.drop_uniform_groups.",
        "troubleshooting.md#while-it-runs",
        REPORT,
        lambda limit, settings: judges.at_least(judges.uniform_share, limit),
    ),
    Rule(
        "gradient_explosion",
        "gradients explode",
        "gradient norm before clipping",
        ".3g",
        ("grad_norm", "bad_steps", "policy_loss", "self_reward_loss"),
        "Training is about to diverge: a lower optimizer.lr, a lower optimizer.grad_clip, less weight for the term "
        "whose loss has risen; ratios that a stale engine has made large.",
        "scaling.md#checklists",
        REPORT,
        lambda limit, settings: judges.anew_once_trained(
            lambda: judges.grown(judges.positive(judges.metric("grad_norm")), limit, settings.early_steps)
        ),
        lambda limit, settings: QUICK,
    ),
    Rule(
        "skipped_steps",
        "updates are skipped",
        "optimizer steps that were skipped",
        ".0f",
        ("bad_steps", "grad_norm"),
        "A loss or gradient was not finite; the batch is kept. After run.max_bad_steps in a row the run stops.",
        "troubleshooting.md#while-it-runs",
        "megatron-laser replay RUN/bad_steps/step_N",
        lambda limit, settings: judges.above(judges.metric("bad_steps"), 0.0),
        lambda limit, settings: (int(limit), settings.window),
    ),
    Rule(
        "failed_gradings",
        "grading fails",
        "share of responses that could not be graded",
        ".0%",
        ("grading_failed", "outcome/timeout", "outcome/crash"),
        "The reward function crashes, or needs longer than reward.deadline; these responses are left out. More "
        "reward.workers, a longer deadline, or mend the function.",
        "rewards.md#when-it-fails",
        CHECK,
        lambda limit, settings: judges.above(judges.failed_share("", ("grading_failed",)), limit),
    ),
    Rule(
        "failed_functions",
        "samples are not made",
        "share of samples that rollout.function did not make",
        ".0%",
        ("function_failed_timeout", "function_failed_error", "function_failed_invalid"),
        "Your rollout.function raises, returns what is none of its kinds, or needs longer than "
        "rollout.function_deadline; the log has the first error.",
        "rollout.md#a-function-of-yours",
        CHECK,
        lambda limit, settings: judges.above(
            judges.failed_share("function_failed_", ("timeout", "error", "invalid")), limit
        ),
    ),
    Rule(
        "server_deaths",
        "servers die",
        "deaths since the start",
        ".0f",
        ("rollout/server_deaths", "rollout/servers_healthy", "rollout/retries"),
        "A server's process ended, or hung and was ended: memory first, then its own log.",
        "rollout.md#what-happens-when-something-fails",
        "tail ENDPOINTS_logs/server_N.log",
        lambda limit, settings: judges.more_deaths("rollout/server_deaths"),
        lambda limit, settings: (int(limit), settings.window),
    ),
    Rule(
        "servers_idle",
        "servers wait",
        "share of the step in which servers are idle",
        ".0%",
        ("idle/servers", "servers/utilisation", "time/train"),
        "The trainer is the slower side: fewer GPUs for servers and more for the trainer, rollout.ahead: 1, or shared "
        "GPUs.",
        "rollout.md#how-many-gpus-for-whom",
        REPORT,
        lambda limit, settings: judges.above(judges.servers_idle_share, limit),
    ),
    Rule(
        "trainer_idle",
        "the trainer waits",
        "share of the step in which the trainer waits",
        ".0%",
        ("idle/trainer", "time/generate"),
        "Generation is the slower side: more servers, rollout.ahead: 1, rollout.oversample against the longest "
        "responses, or a smaller rollout.max_new_tokens.",
        "rollout.md#how-many-gpus-for-whom",
        REPORT,
        lambda limit, settings: judges.above(judges.trainer_idle_share, limit),
    ),
    Rule(
        "straggler",
        "a slow rank",
        "time of the slowest rank over the median",
        ".2f",
        ("straggler/train", "straggler/logprob", "rank_imbalance"),
        "One rank holds up all others: its node's clocks, other jobs on it, its memory or network. The log names the "
        "rank (`slow ranks over the last`).",
        "troubleshooting.md#while-it-runs",
        "megatron-laser env",
        lambda limit, settings: judges.worst_phase("straggler/", limit, 0.05),
        lambda limit, settings: FEW_MEASUREMENTS,
        "comparisons",
    ),
)
