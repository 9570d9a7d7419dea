"""Benchmarks at test time: `settings` says what to evaluate on, `folder` whose responses an output folder holds.

`run` goes through them with `evaluation.evaluate`; an interrupted evaluation goes on where it was.
"""
