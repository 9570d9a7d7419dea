"""What a step will take before any GPU is booked: machines, assumptions, and the time of each phase by arithmetic.

`machine` says what a machine can do, `assumptions` what responses will be like, `phase_times` what follows for one
layout. The memory of a layout is the dry run's (`config/plan`). No torch is imported.
"""
