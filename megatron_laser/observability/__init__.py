"""What a run writes down and shows: metrics, timers, live view, rollout dumps, plots and the report.

Import the modules directly; importing this package imports neither torch nor matplotlib.
"""
