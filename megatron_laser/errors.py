"""The base of every error that a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """Base of every error that the user can put right: their files, settings, servers or machine.

    The command line prints its message as one error without a traceback and exits with status 2. The message says
    what was wrong, where (file and line, setting and value) and what to do.
    """
