"""The partition of the layers and a first order of passes, planned together while the module is built: one rank plans
and tells all others.
"""

from __future__ import annotations

import json
from typing import Annotated, final

from deepspeed.utils import logger
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from ds_vshape.comm.exchange import Exchange
from ds_vshape.config.section import KEY, ScheduleConfig
from ds_vshape.config.to_schedule import KnownStages, fraction_of
from ds_vshape.schedule.memory_limit import rounded_up
from ds_vshape.schedule.partition.balance import PartitionError, check_bounds
from ds_vshape.schedule.partition.partition_and_order import NoPartition, PartitionProblem, plan_partition
from ds_vshape.schedule.serial import JsonSchedule, read_json, schedule_to_json


@final
class _Planned(TypedDict):
    bounds: tuple[Annotated[int, Field(strict=True)], ...]
    schedule: JsonSchedule


@final
class _Failed(TypedDict):
    error: str


_ANSWER: TypeAdapter[_Planned | _Failed] = TypeAdapter(_Planned | _Failed)


def agree_on_stages(problem: PartitionProblem, config: ScheduleConfig, plans: bool, exchange: Exchange) -> KnownStages:
    """What global rank 0 plans in the time that `config` gives it, on every rank; `plans` says whether this is it.
    Collective over the job's `exchange`.

    Raises PartitionError on every rank if it finds no partition within the limits, or if planning fails.
    """
    answer = read_json(exchange.text_of_first(_answer(problem, config) if plans else "").encode(), _ANSWER)
    if "error" in answer:
        raise PartitionError(answer["error"])
    bounds = check_bounds(answer["bounds"], problem.placement.stages, len(problem.layers))
    return KnownStages(problem.layers, bounds, answer["schedule"])


def _answer(problem: PartitionProblem, config: ScheduleConfig) -> str:
    try:
        found = plan_partition(problem, config.planning_seconds / 2)
    except NoPartition as error:
        by_default = " (the default)" if config.memory_limit is None else ""
        return json.dumps({"error": f"no partition of the layers keeps to {KEY}.memory_limit = {fraction_of(config):g}"
                                    f"{by_default}; the least for which one was found is "
                                    f"{rounded_up(fraction_of(config) * error.growth)}: {error}"})
    except Exception as error:
        return json.dumps({"error": f"no partition of the layers can be planned: {type(error).__name__}: {error}"})
    makespans = [f"{each.timeline.makespan:.4g}" if each else "doesn't fit" for each in (found.plan, found.balanced)]
    logger.info(f"partition: planned together with the order of {problem.micro_batches} micro-batches, for a makespan "
                f"of {makespans[0]}; with equal work for all ranks: {makespans[1]}")
    return json.dumps({"bounds": found.bounds, "schedule": schedule_to_json(found.plan.schedule)})
