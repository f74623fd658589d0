"""Which demands of a "pipeline_schedule" section go together, known before any rank is there."""

from __future__ import annotations

from ds_vshape.config import KEY, ConfigError, ScheduleConfig
from ds_vshape.schedule.named import ADAPTIVE, TIMED


def check_demands(config: ScheduleConfig) -> None:
    """Raises ConfigError for what no schedule of that name can do."""
    if isinstance(config.memory_limit, int) and not (config.name == ADAPTIVE and config.times == "profile"):
        raise ConfigError(f"{KEY}.memory_limit = {config.memory_limit} bytes: only an adaptive schedule with \"times\" "
                          "\"profile\" knows bytes; give a fraction of 1F1B's peak")
    if config.times == "profile" and config.name not in (ADAPTIVE, *TIMED):
        raise ConfigError(f"{KEY}.times = 'profile': {config.name} has the same order for all times; it is for "
                          f"{', '.join([ADAPTIVE, *TIMED])}")
