"""Checks that the keys of a "pipeline_schedule" section fit together, without knowing the job's ranks."""

from __future__ import annotations

from ds_vshape.config.section import KEY, ConfigError, ScheduleConfig
from ds_vshape.schedule.named import ADAPTIVE, TIMED, most_micro_batches


def check_demands(config: ScheduleConfig) -> None:
    """Raise ConfigError for keys that the named schedule doesn't support."""
    if isinstance(config.memory_limit, int) and not (config.name == ADAPTIVE and config.times == "profile"):
        raise ConfigError(f"{KEY}.memory_limit = {config.memory_limit} bytes: only an adaptive schedule with \"times\" "
                          "\"profile\" takes bytes; give a fraction of 1F1B's peak")
    if config.times == "profile" and config.name not in (ADAPTIVE, *TIMED):
        raise ConfigError(f"{KEY}.times = 'profile': {config.name} has the same order for all times; legal for "
                          f"{', '.join([ADAPTIVE, *TIMED])}")


def check_micro_batches(micro_batches: int, ranks: int, key: str = "gradient_accumulation_steps") -> None:
    """Raise ConfigError for more micro-batches than a schedule on `ranks` pipeline ranks may have."""
    most = most_micro_batches(ranks)
    if micro_batches > most:
        raise ConfigError(f"{key} = {micro_batches}: must be at most {most} on {ranks} pipeline ranks: ordering "
                          "more of them takes minutes")
