"""The dry run: `resolve` works out what a run would be, `features` what is on, `memory` what a rank holds.

`view` shows it.
"""
