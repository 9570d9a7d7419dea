"""The error of this package."""

from __future__ import annotations

from megatron_laser.errors import UserError


class DataError(UserError, ValueError):
    """A data file, a row, or the way they are read does not fit; the message names the place."""
