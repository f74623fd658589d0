"""The engines that are measured beside each other, all on the same layers, weights and data."""

from __future__ import annotations

import argparse
import re
from typing import Any

from data_parallel import DataParallel
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch_orders import TORCH_SCHEDULES
from torch_pipeline import TorchPipeline
from workloads import Workload

import ds_vshape
from ds_vshape.schedule.named import SCHEDULES

LEARNING_RATE = 0.1


_DEEPSPEED_MODULES: dict[str, type[PipelineModule]] = {
    "deepspeed 1f1b": PipelineModule,
    "deepspeed dualpipev": DualPipeVModule,
}
# The stage of ZeRO, and how many micro-batches run as one.
ZERO = {"deepspeed zero-1": (1, 1), "deepspeed zero-3": (3, 1), "deepspeed zero-3:2": (3, 2)}
CONTENDERS = [*_DEEPSPEED_MODULES, *ZERO, *TORCH_SCHEDULES, *SCHEDULES, "v-zb:4", "interleaved-zb:4"]
# Planned for the times that it measures, within a fraction of 1F1B's peak activations.
ADAPTIVE = re.compile(r"(adaptive|v-min|v-half|v-zb)(?::(4))?((?:\+recompute|\+offload)*)@(profile|[\d.]+)")


def contender_name(name: str) -> str:
    """`name` if there is such a contender: one of CONTENDERS (:4 are four stages on a rank, and of ZeRO :2 two
    micro-batches at a time), adaptive@0.5 or adaptive:4@0.5 (and other fractions), or v-half@profile."""
    if name not in CONTENDERS and ADAPTIVE.fullmatch(name) is None:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CONTENDERS)}, adaptive@0.5, v-half@profile")
    return name


def section_of(name: str, times: str) -> Any:
    """What the config says for one of our contenders; one that plans does so for `times`."""
    match = ADAPTIVE.fullmatch(name)
    if match is None:
        schedule, _, chunks = name.partition(":")
        return {"name": schedule, "chunks": int(chunks)} if chunks else name
    schedule, chunks, means, limit = match.groups()
    section = {"name": schedule, "times": times, **({"chunks": int(chunks)} if chunks else {}),
               **dict.fromkeys(means.split("+")[1:], True)}
    return section if limit == "profile" else {**section, "memory_limit": float(limit)}


def engine_of(name: str, workload: Workload, times: str = "profile", *, dynamic_shape: bool = False,
              **config_keys: Any) -> Any:
    """The engine of contender `name`, with more `config_keys` in its ds_config; collective.

    Of these keys torch's pipelines take gradient_clipping alone, and data parallelism none.
    """
    if name in ZERO:
        stage, joined = ZERO[name]
        return DataParallel(stage, workload, LEARNING_RATE, joined)
    if name in TORCH_SCHEDULES:
        return TorchPipeline(TORCH_SCHEDULES[name], workload, LEARNING_RATE, config_keys.get("gradient_clipping", 0.0))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": workload.micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "gradient_clipping": 0.0,
        "steps_per_print": 1000000,
        # A collection in one rank's batch makes all others wait.
        "disable_python_gc": True,
        **config_keys,
    }
    if name in _DEEPSPEED_MODULES:
        module_class, options = _DEEPSPEED_MODULES[name], {}
    else:
        config.setdefault("pipeline_schedule", section_of(name, times))
        module_class, options = ds_vshape.PipelineModule, {"config": config, "example": workload.batch(0)[0]}
    specs = [workload.spec(number) for number in range(workload.layers)]
    module = module_class(specs, num_stages=workload.ranks, loss_fn=workload.loss_fn, seed_layers=True,
                          partition_method="uniform", dynamic_shape=dynamic_shape, **options)
    # The seeds are for equal weights. Seeding before every layer call takes a CPU build of torch over a millisecond.
    module.seed_layers = False
    engine = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
    if name not in _DEEPSPEED_MODULES:
        workload.prepare(engine)
    return engine
