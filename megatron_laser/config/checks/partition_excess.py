"""The partition excess Z - 1 of the score's closed form, in log space: when the score disturbs the policy.

Z = 1 + pi_ref(z_c) * (e^(1/beta) - 1), arXiv 2510.14943. The score of a right response reaches 1 only while
pi_ref(z_c) * e^(1/beta) is far below 1, since it is a probability taken from all other tokens.
"""

from __future__ import annotations

import math

EXCESS_LIMIT = 0.05


def log_partition_excess(ref_logprob: float, beta: float, reward: float = 1.0) -> float:
    """log(Z - 1) for `ref_logprob` in nats; `reward` > 0 is the score of a right response.

    Stays finite where e^(1/beta) overflows.
    """
    exponent = reward / beta
    return ref_logprob + exponent + math.log(-math.expm1(-exponent))


def smallest_beta(ref_logprob: float, reward: float = 1.0, limit: float = EXCESS_LIMIT) -> float:
    """The beta at which Z - 1 equals `limit`; larger ones have less excess."""
    # Z - 1 = limit  <=>  reward / beta = log(1 + limit * e^-ref_logprob)
    exponent = math.log(limit) - ref_logprob
    softplus = max(exponent, 0.0) + math.log1p(math.exp(-abs(exponent)))
    return reward / softplus


def round_up(value: float, digits: int = 3) -> float:
    """`value` rounded up to `digits` significant digits, so that a bound stays a bound."""
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale


def partition_problems(ref_logprob: tuple[str, float], beta: tuple[str, float], right: float) -> list[str]:
    """That the right target asks for too large a probability of the score token; each setting's name and value."""
    (ref_setting, ref), (beta_setting, scale) = ref_logprob, beta
    log_excess = log_partition_excess(ref, scale, right)
    if log_excess <= math.log(EXCESS_LIMIT):
        return []
    excess = f"{math.exp(log_excess):.3g}" if log_excess < 100 else f"e^{log_excess:.1f}"
    least = round_up(smallest_beta(ref, right))
    return [
        f"{beta_setting} {scale:g} with {ref_setting} {ref:g}: Z - 1 = e^ref_logprob * "
        f"(e^({right:g}/beta) - 1) = e^{ref:g} * (e^{right / scale:.4g} - 1) = {excess}, more than "
        f"{EXCESS_LIMIT}; the score token would take probability from the policy's own tokens. Set "
        f"{beta_setting} to {least:g} or more, or laser.allow_partition_excess: true to run all the same"
    ]
