"""Alarms: what a run's metrics say is wrong with it, in words; see docs/observing.md."""

from megatron_laser.observability.alarms.watch import RULES, Alarm, AlarmWatch, alarms_of, settings_of

__all__ = ["RULES", "Alarm", "AlarmWatch", "alarms_of", "settings_of"]
