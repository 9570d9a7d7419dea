"""What a run writes down and shows: metrics (`metrics_logger`), timers, the live view and rollout dumps.

Import the modules directly; importing this package imports neither torch nor matplotlib.
"""
