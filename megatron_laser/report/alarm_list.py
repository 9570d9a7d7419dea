"""The alarms of each run, as the report has them."""

from __future__ import annotations

from megatron_laser.observability.alarms import Alarm, alarms_of, settings_of
from megatron_laser.report.run_data import Run


def alarm_list(runs: list[Run]) -> str:
    """Markdown: a list for each run, in the order in which its alarms were raised; "none" where there were none."""
    return "\n".join(_of_run(run) for run in runs)


def _of_run(run: Run) -> str:
    settings = settings_of(run.config)
    if not settings.enabled:
        return f"**{run.label}**: off (`alarms.enabled: false`).\n"
    alarms = alarms_of(run.rows, settings)
    if not alarms:
        return f"**{run.label}**: none.\n"
    return f"**{run.label}**\n\n" + "\n".join(_line(alarm) for alarm in alarms) + "\n"


def _line(alarm: Alarm) -> str:
    steps = (
        f"from step {alarm.step} on"
        if alarm.last_step is None
        else f"steps {alarm.step} to {alarm.last_step}"
    )
    return f"- `{alarm.name}`, {steps}: {alarm.message} Look at: {alarm.place}."
