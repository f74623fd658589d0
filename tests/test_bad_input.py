"""Bad input: one clear error, the same on every rank, and nothing hangs."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from pipelines import Job, cross_entropy, specs
from ranks import run_ranks

import ds_vshape


def error_of(rank: int, build: Any) -> str:
    try:
        build()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def with_section(section: Any, **config: Any) -> Any:
    """Builds an engine whose config has `section` as "pipeline_schedule"."""
    return lambda: Job(section, 2, 2, config).engine()


def module_of(config: Any, module_class: Any = ds_vshape.PipelineModule, **options: Any) -> Any:
    return module_class(specs(4), num_stages=2, loss_fn=cross_entropy, **({} if config is None else {"config": config}),
                        **options)


def initialized(module: Any, config: Any) -> Any:
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config)


STOCK = Job(None, 2, 2).ds_config()
V_HALF = {**STOCK, "pipeline_schedule": "v-half"}
V_ZB = {**STOCK, "pipeline_schedule": "v-zb"}

CASES: dict[str, tuple[Any, str]] = {
    "an unknown schedule": (with_section("v-haf"), "ValueError: there is no schedule 'v-haf'; did you mean 'v-half'?"),
    "an unknown key": (with_section({"name": "v-half", "memory_limt": 0.5}),
                       "ConfigError: unknown key pipeline_schedule.memory_limt = 0.5: did you mean 'memory_limit'?"),
    "a misspelt section": (lambda: module_of({**STOCK, "pipeline_shedule": "v-half"}),
                           "ConfigError: unknown key 'pipeline_shedule' in the DeepSpeed config: did you mean "
                           "'pipeline_schedule'?"),
    "no name": (with_section({"memory_limit": 0.5}), "ConfigError: pipeline_schedule.name is missing"),
    "a section of another type": (with_section(["v-half"]), "ConfigError: pipeline_schedule = ['v-half']: must be"),
    "a memory limit of zero": (with_section({"name": "v-half", "memory_limit": 0}),
                               "ConfigError: pipeline_schedule.memory_limit = 0: must be a number above 0"),
    "a memory limit in percent": (with_section({"name": "v-half", "memory_limit": 50}),
                                  "ConfigError: pipeline_schedule.memory_limit = 50: must be a number above 0"),
    "a memory limit that the schedule breaks": (with_section({"name": "v-zb", "memory_limit": 0.5}),
                                                "MemoryLimitError: memory_limit = 0.5: v-zb needs 1 of 1F1B's"),
    "bytes for a schedule that measures none": (with_section({"name": "v-half", "memory_limit": "1GiB"}),
                                                "ConfigError: pipeline_schedule.memory_limit = 1073741824 bytes: only "
                                                "an adaptive schedule"),
    "fewer layers than stages": (lambda: ds_vshape.PipelineModule(specs(1), num_stages=2, config=V_HALF),
                                 "PipelineError: 3 layers can't fill 4 stages: v-half on 2 pipeline ranks"),
    "ZeRO-2": (with_section("v-half", zero_optimization={"stage": 2}),
               "ConfigError: zero_optimization.stage = 2: must be 0 or 1 with pipeline parallelism"),
    "ZeRO-3": (with_section("v-half", zero_optimization={"stage": 3}),
               "ConfigError: zero_optimization.stage = 3: must be 0 or 1 with pipeline parallelism"),
    "fp16 without ZeRO": (with_section("v-half", fp16={"enabled": True}),
                          "ConfigError: zero_optimization.stage = 0 with fp16: must be 1"),
    "another schedule at initialize": (lambda: initialized(module_of(V_HALF), V_ZB),
                                       "ConfigError: pipeline_schedule: the PipelineModule was built for {'name': "
                                       "'v-half'}, initialize's config says {'name': 'v-zb'}"),
    "a schedule only in the module": (lambda: initialized(module_of(V_HALF), STOCK),
                                      "ConfigError: pipeline_schedule: the PipelineModule was built for {'name': "
                                      "'v-half'}, initialize's config says no schedule"),
    "a schedule only at initialize": (lambda: initialized(module_of(None), V_HALF),
                                      "ConfigError: pipeline_schedule: the PipelineModule was built for no schedule"),
    "DeepSpeed's own module": (lambda: initialized(module_of(None, deepspeed.pipe.PipelineModule), V_HALF),
                               "ConfigError: pipeline_schedule = 'v-half': the model is a PipelineModule of "
                               "DeepSpeed's; build it as a ds_vshape.PipelineModule"),
    "no pipeline at all": (lambda: initialized(torch.nn.Linear(2, 2), V_HALF),
                           "ConfigError: pipeline_schedule = 'v-half': the model is a Linear"),
    "an unknown choice": (with_section({"name": "v-half", "deferred": "biases"}),
                          "ConfigError: pipeline_schedule.deferred = 'biases': Input should be 'matrices' or 'all'"),
    "no such file": (lambda: module_of("nowhere.json"), "ConfigError: DeepSpeed config 'nowhere.json': no such file"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error_on_every_rank(case: str) -> None:
    build, message = CASES[case]
    errors = run_ranks(2, error_of, build, timeout=60)
    assert errors[0] == errors[1]
    assert errors[0].startswith(message)
    assert "\n" not in errors[0]
