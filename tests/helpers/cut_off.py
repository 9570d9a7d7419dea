"""Responses of which some were cut off, and the ids of a text that stands behind these."""

from helpers.rollouts import Response

IDS = [9, 7, 1]
GROUPS = [
    [Response(5, True), Response(9, False, truncated=True), Response(7, True, truncated=True)],
    [Response(4, True), Response(1, False), Response(8, False, truncated=True)],
]
CUT = [1, 2, 5]
