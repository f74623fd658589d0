"""Which demands of a "pipeline_schedule" section go together, known before any rank is there."""

from __future__ import annotations

from ds_vshape.config.section import KEY, ConfigError, ScheduleConfig
from ds_vshape.schedule.named import ADAPTIVE, TIMED, most_micro_batches


def check_demands(config: ScheduleConfig) -> None:
    """Raises ConfigError for what no schedule of that name can do."""
    if isinstance(config.memory_limit, int) and not (config.name == ADAPTIVE and config.times == "profile"):
        raise ConfigError(f"{KEY}.memory_limit = {config.memory_limit} bytes: only an adaptive schedule with \"times\" "
                          "\"profile\" knows bytes; give a fraction of 1F1B's peak")
    if config.times == "profile" and config.name not in (ADAPTIVE, *TIMED):
        raise ConfigError(f"{KEY}.times = 'profile': {config.name} has the same order for all times; it is for "
                          f"{', '.join([ADAPTIVE, *TIMED])}")


def check_micro_batches(micro_batches: int, ranks: int, key: str = "gradient_accumulation_steps") -> None:
    """Raises ConfigError for a batch of more micro-batches than can be put in order on `ranks` pipeline ranks."""
    most = most_micro_batches(ranks)
    if micro_batches > most:
        raise ConfigError(f"{key} = {micro_batches}: must be at most {most} on {ranks} pipeline ranks, which take "
                          "minutes to put so many in order")
