"""Alarms of what is learned: scores, entropy, length, how responses end, signs of reward hacking."""

from __future__ import annotations

from megatron_laser.observability.alarms import judges
from megatron_laser.observability.alarms.rule import CHECK, FEW_MEASUREMENTS, INSPECT, REPORT, Rule

_LENGTH = judges.metric("response_length_mean")

POLICY_RULES: tuple[Rule, ...] = (
    Rule(
        "score_collapse",
        "score collapse",
        "AUROC of the score",
        ".3f",
        ("self_reward_auroc", "score_right_mean", "score_wrong_mean", "self_reward_loss"),
        "The score does not tell right responses from wrong ones although it has been trained for long: too little "
        "weight (laser.alpha, laser.class_weights), a score token that other text contains, or responses that do not "
        "show whether they are right.",
        "algorithm.md#self-reward-loss--self_rewardself_reward_loss-class_weights",
        REPORT,
        lambda limit, settings: judges.once_trained(
            settings.score_patience, judges.below(judges.metric("self_reward_auroc"), limit)
        ),
    ),
    Rule(
        "score_flat",
        "one score for all",
        "largest of the distance between right and wrong and the spreads of the scores",
        ".4f",
        ("score_right_mean", "score_wrong_mean", "score_right_std", "score_wrong_std"),
        "All responses get the same score, so that votes and advantages get nothing from it: the loss has found the "
        "mean of the labels. More weight (laser.alpha), laser.class_weights, or groups with right and wrong responses.",
        "algorithm.md#self-reward-loss--self_rewardself_reward_loss-class_weights",
        REPORT,
        lambda limit, settings: judges.once_trained(settings.score_patience, judges.flat_scores(limit)),
    ),
    Rule(
        "score_shift",
        "scores moved as a whole",
        "distance of the middle between right and wrong from 1/2",
        ".2f",
        ("score_right_mean", "score_wrong_mean", "zc_logprob_mean", "drift/right", "drift/wrong"),
        "Scores of right and wrong responses have moved together, so that a threshold of 1/2 calls all the same: "
        "laser.ref_logprob is not this model's, or the labels are nearly all of one kind.",
        "algorithm.md#does-c_ref-still-hold",
        "megatron-laser calibrate",
        lambda limit, settings: judges.once_trained(
            settings.score_patience, judges.above(judges.distance(judges.score_middle), limit)
        ),
    ),
    Rule(
        "entropy_collapse",
        "entropy collapse",
        "entropy in nats",
        ".3g",
        ("entropy", "groups_uniform_fraction", "reward_std"),
        "The policy has become nearly deterministic: groups get one reward and little is left to learn. A lower "
        "optimizer.lr, policy.clip_high above clip_low, policy.entropy_coefficient, a KL, or harder problems.",
        "algorithm.md#policy-loss--policy_losspy",
        INSPECT,
        lambda limit, settings: judges.shrunk(judges.metric("entropy"), limit, settings.early_steps),
    ),
    Rule(
        "length_growth",
        "responses grow long",
        "mean response length in tokens",
        ".0f",
        ("response_length_mean", "truncated_fraction"),
        "Responses have grown several times over: thinking that pays, or loops and padding that cost nothing. Read "
        "some; near rollout.max_new_tokens they are cut (truncated_fraction). policy.overlong_buffer and "
        "policy.length_penalty hold against it.",
        "configuration.md#policy",
        f"{INSPECT} --sort length",
        lambda limit, settings: judges.grown(_LENGTH, limit, settings.early_steps),
    ),
    Rule(
        "length_shrink",
        "responses shrink",
        "mean response length in tokens",
        ".0f",
        ("response_length_mean", "reward_mean", "outcome/no_answer"),
        "The policy has given up writing the solution and guesses, or ends at once: a reward that guesses can earn, a "
        "length penalty that is too high, or a token_mean that favours short right responses.",
        "configuration.md#policy",
        f"{INSPECT} --sort length",
        lambda limit, settings: judges.shrunk(_LENGTH, limit, settings.early_steps),
    ),
    Rule(
        "truncated",
        "many responses are cut",
        "share of responses that did not end by themselves",
        ".0%",
        ("truncated_fraction", "response_length_mean", "scored_fraction"),
        "Responses reach rollout.max_new_tokens: raise it, or the policy does not end any more. What is cut is wrong, "
        "and has no score.",
        "troubleshooting.md#while-it-runs",
        f"{INSPECT} --finish length",
        lambda limit, settings: judges.above(judges.metric("truncated_fraction"), limit),
    ),
    Rule(
        "unscored",
        "many responses have no score",
        "share of responses without a score",
        ".0%",
        ("scored_fraction", "truncated_fraction"),
        "Only responses that end by themselves have a score, so the self-reward learns from the rest alone: a larger "
        "rollout.max_new_tokens, the right rollout.stop_token_ids, or an environment that leaves the last turn to the "
        "policy.",
        "troubleshooting.md#while-it-runs",
        f"{INSPECT} --finish length",
        lambda limit, settings: judges.above(judges.unscored_share, limit),
    ),
    Rule(
        "no_end",
        "no response ends",
        "share of responses that did not end by themselves",
        ".0%",
        ("truncated_fraction", "outcome/no_answer"),
        "Not one response of these steps ended on a stop token: the policy ends with another one than "
        "rollout.stop_token_ids, or has forgotten to end.",
        "troubleshooting.md#what-check-says",
        CHECK,
        lambda limit, settings: judges.at_least(judges.metric("truncated_fraction"), 1.0),
        lambda limit, settings: (int(limit), int(limit)),
    ),
    Rule(
        "unreadable",
        "answers or references that cannot be read",
        "share of responses whose answer could not be compared",
        ".0%",
        ("outcome/unparsable", "outcome/wrong"),
        "References that are no mathematics to the grader, or boxes that hold none: look at both. Such responses count "
        "as wrong, whatever they say.",
        "troubleshooting.md#data-and-rewards",
        CHECK,
        lambda limit, settings: judges.above(judges.graded_share("unparsable"), limit),
    ),
    Rule(
        "hacking_format",
        "format right, answers wrong",
        "share of responses with an answer that can be judged",
        ".0%",
        ("outcome/wrong", "outcome/no_answer", "reward_mean"),
        "The policy has learned to give an answer, not the right one: the reward pays for the form, or the problems "
        "are too hard.",
        "rewards.md",
        f"{INSPECT} --wrong",
        lambda limit, settings: judges.up_without_accuracy(
            judges.graded_share("correct", "wrong"), limit, settings.early_steps
        ),
    ),
    Rule(
        "hacking_score",
        "wrong responses score high",
        "mean score of wrong responses",
        ".2f",
        ("score_wrong_mean", "score_right_mean", "self_reward_auroc", "reward_mean"),
        "The policy has learned to make its score rise without being right: advantages from scores (laser.tau) reward "
        "it. A smaller laser.tau, more laser.alpha, or the verifier's reward alone for a while.",
        "algorithm.md#advantages--advantagespy",
        f"{INSPECT} --wrong --min-score 0.5 --sort score",
        lambda limit, settings: judges.once_trained(
            settings.score_patience,
            judges.up_without_accuracy(
                judges.metric("score_wrong_mean"), limit, settings.early_steps, judges.HIGH_SCORE
            ),
        ),
    ),
    Rule(
        "hacking_validation",
        "validation falls while rollouts improve",
        "accuracy on the validation split",
        ".3f",
        ("eval/accuracy", "reward_mean", "accuracy_tried"),
        "What is learned does not carry over: training problems are memorised, or the training reward can be had "
        "without being right. Take the checkpoint of the best evaluation; more data, a KL, a stricter reward.",
        "rewards.md",
        REPORT,
        lambda limit, settings: judges.validation_fall(limit, settings.window, settings.early_steps),
        lambda limit, settings: FEW_MEASUREMENTS,
        "evaluations",
    ),
    Rule(
        "accuracy_fall",
        "accuracy falls",
        "share of right responses",
        ".0%",
        ("reward_mean", "accuracy_tried", "grad_norm"),
        "The policy is worse than it was at the beginning: an optimizer.lr that is too high, weights that do not reach "
        "the engine, or a score that pulls elsewhere; harder data where its order is not shuffled.",
        "scaling.md#checklists",
        REPORT,
        lambda limit, settings: judges.accuracy_fall(limit, settings.early_steps),
    ),
)
