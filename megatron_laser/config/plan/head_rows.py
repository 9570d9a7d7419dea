"""How many labelled rows the log-prob head has at most: those of tokens, and what readouts read besides.

A response of n tokens has n policy rows and, for one token read behind its end, one more; its prompt has a token at
least. So with one such readout, or none, a micro-batch of T tokens has at most T rows. Readouts of several tokens, or
at several places, add to that.
"""

from __future__ import annotations

from megatron_laser.config.derived import padded_tokens
from megatron_laser.config.model_folder.continuation import longest_trained
from megatron_laser.config.readouts import readouts
from megatron_laser.config.schema.root import RunConfig

# Tokens from one delimiter of a readout to the next, an allowance: responses alone know how often it comes.
DELIMITER_TOKENS = 16


def extra_rows(config: RunConfig, tokens: int, replica_tokens: int) -> int:
    """Rows beyond one a token that `tokens` tokens of a rank have at most, all of them of responses.

    Args: replica_tokens: as of `rank_tokens`, which says how many responses there can be.
    """
    longest = padded_tokens(longest_trained(config), config.parallel)
    responses = min(tokens, replica_tokens // longest)
    # A context rank has two pieces of each response, and each may have a place more than its length divided.
    pieces = 2 * responses if config.parallel.context > 1 else 0
    finished = forced = between = 0
    for readout in readouts(config):
        count = max(1, len(readout.tokens))
        if readout.position == "every":
            between += count * min(tokens, tokens // readout.every + pieces)
        elif readout.position == "delimiter":
            between += count * min(tokens, tokens // DELIMITER_TOKENS + pieces)
        elif readout.position == "forced":
            forced += count
        else:
            finished += count
    # A response has ended by itself, or was cut off.
    return between + max(0, max(finished, forced) - 1) * responses
