"""A job's configuration, read and checked before any rank waits for another one.

    section.py         the "pipeline_schedule" section of ds_config.json, and where it is read from
    to_schedule.py     the schedule of the table that the section names, or the request to the planner
    batch_size.py      how many micro-batches a batch has
    compatibility.py   which keys of that section, and of the rest of a ds_config, can be combined
    folders.py         folders that rank 0 writes into
    arguments.py       the arguments of a PipelineModule
"""

from ds_vshape.config.section import KEY, ConfigError, ScheduleConfig

__all__ = ["ConfigError", "KEY", "ScheduleConfig"]
