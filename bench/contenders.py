"""The engines that are measured beside each other, all on the same layers, weights and data."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch.nn import functional

import ds_vshape
from ds_vshape.schedule.named import SCHEDULES
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate
from layers import SleepingLinear
from torch_pipeline import TORCH_SCHEDULES, TorchPipeline

WIDTH = 16
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Workload:
    """`layers` sleeping layers a rank, each taking `seconds` = (F, B, W)."""

    ranks: int
    layers: int
    micro_batches: int
    seconds: tuple[float, ...]

    @property
    def work(self) -> float:
        """Seconds a batch if no rank ever waited."""
        return self.micro_batches * self.layers * sum(self.seconds)

    def slept(self) -> Workload:
        """This workload with the seconds that its sleeps really take here, measured now."""
        return replace(self, seconds=tuple(_sleep_of(seconds) for seconds in self.seconds))

    def specs(self) -> list[LayerSpec]:
        return [LayerSpec(SleepingLinear, WIDTH, self.seconds) for _ in range(self.ranks * self.layers)]

    def batch(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of batch `number`."""
        generator = torch.Generator().manual_seed(number)
        return [(torch.randn(2, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator))
                for _ in range(self.micro_batches)]

    def simulated(self, schedule: Schedule) -> float:
        """The makespan of a schedule if nothing but its passes took time."""
        stages = schedule.placement.stages
        layers = self.layers * self.ranks / stages
        return simulate(schedule, Times.uniform(stages, *(layers * seconds for seconds in self.seconds))).makespan


def _sleep_of(seconds: float, times: int = 20) -> float:
    start = time.perf_counter()
    for _ in range(times):
        time.sleep(seconds)
    return (time.perf_counter() - start) / times


_DEEPSPEED_MODULES: dict[str, type[PipelineModule]] = {
    "deepspeed 1f1b": PipelineModule,
    "deepspeed dualpipev": DualPipeVModule,
}
CONTENDERS = [*_DEEPSPEED_MODULES, *TORCH_SCHEDULES, *SCHEDULES]
# Planned for the times that it measures, within a fraction of 1F1B's peak activations.
ADAPTIVE = re.compile(r"(adaptive|v-min|v-half|v-zb)@(profile|[\d.]+)")


def contender_name(name: str) -> str:
    """`name` if there is such a contender: one of CONTENDERS, adaptive@0.5 (and other fractions), or v-half@profile."""
    if name not in CONTENDERS and ADAPTIVE.fullmatch(name) is None:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CONTENDERS)}, adaptive@0.5, v-half@profile")
    return name


def section_of(name: str) -> Any:
    """What the config says for one of our contenders."""
    match = ADAPTIVE.fullmatch(name)
    if match is None:
        return name
    schedule, limit = match.groups()
    section = {"name": schedule, "times": "profile"}
    return section if limit == "profile" else {**section, "memory_limit": float(limit)}


def engine_of(name: str, workload: Workload) -> Any:
    """The engine of contender `name`; collective."""
    if name in TORCH_SCHEDULES:
        return TorchPipeline(TORCH_SCHEDULES[name], workload.ranks * workload.layers, WIDTH, workload.seconds,
                             workload.micro_batches, LEARNING_RATE)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": workload.micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "gradient_clipping": 0.0,
        "steps_per_print": 1000000,
        # A collection in one rank's batch makes all others wait.
        "disable_python_gc": True,
    }
    if name in _DEEPSPEED_MODULES:
        module_class, options = _DEEPSPEED_MODULES[name], {}
    else:
        config["pipeline_schedule"] = section_of(name)
        module_class, options = ds_vshape.PipelineModule, {"config": config}
    module = module_class(workload.specs(), num_stages=workload.ranks, loss_fn=functional.mse_loss, seed_layers=True,
                          partition_method="uniform", **options)
    # The seeds are for equal weights. Seeding before every layer call takes a CPU build of torch over a millisecond.
    module.seed_layers = False
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
