"""The error of test-time commands about what the user gave."""

from __future__ import annotations

from megatron_laser.errors import UserError


class TestTimeError(UserError, ValueError):
    """An input or setting does not fit; names it, what was expected and what to do."""

    __test__ = False  # the name is not that of a test class
