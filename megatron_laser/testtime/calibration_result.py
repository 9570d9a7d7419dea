"""What a calibration found: each token's statistics, the verdict on it, and the settings to paste."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megatron_laser.config.checks.partition_excess import (
    EXCESS_LIMIT,
    log_partition_excess,
    round_up,
    smallest_beta,
)
from megatron_laser.config.model_folder.spare_tokens import SpareToken
from megatron_laser.config.yaml_text import yaml_text
from megatron_laser.files import plain, write_atomically

BETAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
PROPOSED_EXCESS = 1e-3
"""Z - 1 of the proposed beta at most: a right answer is asked for about this probability of the score token. A run
refuses more than `partition_excess.EXCESS_LIMIT`."""
MAX_EOS_GAP = 1.0
"""Nats between the means behind different EOS tokens: one c_ref cannot serve both."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """One token's log-prob behind the initial model's responses, in nats.

    Attributes:
        mean: c_ref. std: unbiased. quantiles: by the names of QUANTILES.
        by_eos: EOS id -> mean behind the responses that it ended.
        refused: why it will not do; "" where it will.
    """

    id: int
    text: str | None
    kind: str
    mean: float = math.nan
    std: float = math.nan
    quantiles: dict[str, float] = field(default_factory=dict)
    by_eos: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    @staticmethod
    def generated(token: SpareToken) -> TokenStatistics:
        """The token stands in a response, so it is in use."""
        return TokenStatistics(token.id, token.text, token.kind, refused="the model generated it")

    @staticmethod
    def of(
        token: SpareToken, logprobs: Sequence[float], ends: Sequence[int], *, max_std: float
    ) -> TokenStatistics:
        """Statistics and verdict.

        Args:
            logprobs: [responses], of this token behind each response.
            ends: [responses], the EOS id of each.
        """
        values = np.asarray(logprobs, dtype=np.float64)
        mean, std = float(values.mean()), float(values.std(ddof=1))
        by_eos = {str(end): float(values[np.asarray(ends) == end].mean()) for end in sorted(set(ends))}
        refused = ""
        gap = max(by_eos.values()) - min(by_eos.values())
        if std > max_std:
            refused = (
                f"its log-prob varies by {std:.2f} nats (standard deviation; at most {max_std:g}): no constant c_ref "
                "describes it, and the score would start as noise"
            )
        elif gap > MAX_EOS_GAP:
            refused = (
                f"its mean differs by {gap:.2f} nats between the EOS tokens {', '.join(by_eos)} (at most "
                f"{MAX_EOS_GAP:g}): set rollout.stop_token_ids to one of them"
            )
        elif mean > -1.0:
            refused = f"its mean log-prob is {mean:.2f}: the model expects it behind a response"
        return TokenStatistics(
            token.id,
            token.text,
            token.kind,
            mean=mean,
            std=std,
            quantiles={f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES},
            by_eos=by_eos,
            refused=refused,
        )

    @property
    def name(self) -> str:
        """As the configuration has it."""
        return str(self.id) if self.text is None else self.text

    def beta(self, wanted: float) -> float:
        """`wanted`, or the larger one at which Z - 1 is PROPOSED_EXCESS."""
        return max(wanted, round_up(smallest_beta(self.mean, limit=PROPOSED_EXCESS), 2))


@dataclass(frozen=True, slots=True)
class Calibration:
    """All tokens measured. `responses` of `sampled` ended by themselves and were used.

    weights: what the constants are about, by content (see `weight_identity`); None: servers did not tell.
    """

    model: str
    responses: int
    sampled: int
    beta: float
    max_std: float
    tokens: list[TokenStatistics]
    weights: str | None = None

    @property
    def chosen(self) -> TokenStatistics | None:
        """The token with the least score noise beta * std at the smallest beta; None where all are refused."""
        usable = [token for token in self.tokens if not token.refused]
        return min(usable, key=lambda t: (t.beta(self.beta), t.std, t.id), default=None)

    def laser_yaml(self) -> str:
        """The `laser` section to paste; "" where no token will do."""
        token = self.chosen
        if token is None:
            return ""
        beta = token.beta(self.beta)
        section = {
            "score_token": token.id if token.text is None else token.text,
            "ref_logprob": round(token.mean, 3),
            "beta": beta,
        }
        head = (
            f"# {self.model}: id {token.id}, log-prob {token.mean:.3f} +- {token.std:.3f} nats behind {self.responses} "
            f"responses; Z - 1 = {_excess(token.mean, beta)}\n"
            + ("" if self.weights is None else f"# weights {self.weights}\n")
        )
        return head + yaml_text({"laser": section}, width=80)

    def text(self) -> str:
        """Tables and the verdict, for the terminal."""
        lines = [f"log-prob behind {self.responses} finished responses (of {self.sampled}), in nats:", ""]
        heads = [f"q{q:g}" for q in QUANTILES]
        lines.append(
            f"{'token':28s} {'id':>7s} {'mean':>8s} {'std':>6s} " + " ".join(f"{h:>7s}" for h in heads)
        )
        for token in self.tokens:
            row = f"{token.name[:28]:28s} {token.id:7d} {token.mean:8.3f} {token.std:6.3f} "
            row += " ".join(f"{token.quantiles.get(f'{q:g}', math.nan):7.2f}" for q in QUANTILES)
            lines.append(row)
            if token.refused:
                lines.append(f"    refused: {token.refused}")
        chosen = self.chosen
        if chosen is None:
            lines += [
                "",
                "No token will do. Measure others with --token, or sample more like training does (chat template, "
                "suffix, lengths). --max-std raises the limit: the paper trained OctoThinker with 1.18 nats.",
            ]
            return "\n".join(lines)
        lines += [
            "",
            f"Z - 1 for {chosen.name} (below {EXCESS_LIMIT:g} is required, below {PROPOSED_EXCESS:g} better):",
        ]
        lines.append("beta     " + " ".join(f"{beta:>9g}" for beta in BETAS))
        lines.append("Z - 1    " + " ".join(f"{_excess(chosen.mean, beta):>9s}" for beta in BETAS))
        worst = chosen.quantiles["0.99"]
        lines.append(
            "at q0.99 "
            + " ".join(f"{_excess(worst, beta):>9s}" for beta in BETAS)
            + "   (1 % of responses have more)"
        )
        lines.append(
            "noise    "
            + " ".join(f"{beta * chosen.std:9.3f}" for beta in BETAS)
            + "   (beta * std, in score)"
        )
        if chosen.beta(self.beta) > self.beta:
            asked = math.exp(min(0.0, chosen.mean + 1 / self.beta))
            lines.append(
                f"beta {self.beta:g} would ask for the score token with probability {asked:.2g}; "
                f"{chosen.beta(self.beta):g} is proposed"
            )
        lines += ["", self.laser_yaml()]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """calibration.json with everything, and laser.yaml with what to paste (none without a token)."""
        content = asdict(self) | {
            "tokens": [
                {
                    **{
                        name: value
                        for name, value in asdict(token).items()
                        if name not in ("quantiles", "by_eos")
                    },
                    "quantiles": token.quantiles,
                    "by_eos": token.by_eos,
                    "partition_excess": {
                        f"{beta:g}": math.exp(log_partition_excess(token.mean, beta))
                        for beta in BETAS
                        if math.isfinite(token.mean)
                    },
                }
                for token in self.tokens
            ]
        }
        for token in content["tokens"]:
            token["mean"], token["std"] = plain(token["mean"]), plain(token["std"])
        chosen = self.chosen
        content["chosen"] = None if chosen is None else chosen.name
        write_atomically(
            folder / "calibration.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )
        if chosen is None:
            (folder / "laser.yaml").unlink(missing_ok=True)
        else:
            write_atomically(folder / "laser.yaml", self.laser_yaml())


def _excess(mean: float, beta: float) -> str:
    logarithm = log_partition_excess(mean, beta)
    return f"{math.exp(logarithm):.1e}" if logarithm < 50 else f"e^{logarithm:.0f}"
