"""What a job's configuration says, read and checked before any rank waits for another one.

    section.py         the "pipeline_schedule" section of ds_config.json, and where it is looked for
    to_schedule.py     the schedule of the table that the section names, or the request to the planner
    compatibility.py   which keys of that section go together, and what the rest of a ds_config may say
    arguments.py       the arguments of a PipelineModule
"""

from ds_vshape.config.section import KEY, ConfigError, ScheduleConfig

__all__ = ["ConfigError", "KEY", "ScheduleConfig"]
