"""`ds_vshape.initialize`: deepspeed.initialize, with our engine where the config has the key; and engines that a script
makes without it.

A script may make a subclass of DeepSpeed's PipelineEngine, and construct it itself or put it into deepspeed's globals.
For a model of ours such an object becomes one of our engine's as well: of a class with the script's methods first, then
ours, then DeepSpeed's. For that DeepSpeed's class gets a __new__; it has none of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_vshape.config.compatibility import (check_accepted, check_asynchronous, check_monitor_folders, check_monitors,
                                            check_post_validation)
from ds_vshape.config.section import (ENVIRONMENT_VARIABLE, KEY, ConfigError, DsConfig, ScheduleConfig, load_ds_config,
                                      read_section)
from ds_vshape.deepspeed_adapter.engine import PipelineEngine as StockPipelineEngine
from ds_vshape.deepspeed_adapter.engine import class_with_instructions, instructions_of
from ds_vshape.deepspeed_adapter.module import StockPipelineModule
from ds_vshape.deepspeed_adapter.parts import check_parts
from ds_vshape.deepspeed_adapter.versions import check_versions
from ds_vshape.engine.engine import PipelineEngine
from ds_vshape.engine.post_validation import PostValidatingEngine
from ds_vshape.health.preflight import Facts, config_facts
from ds_vshape.health.watch import groups_without_limit
from ds_vshape.module.pipeline_module import PipelineModule, before_building

__all__ = ["PipelineModule", "engines_for_our_models", "initialize"]

# Before anything is put in its place.
_stock_initialize = deepspeed.initialize


def initialize(args: Any = None, model: Any = None, optimizer: Any = None, model_parameters: Any = None,
               *positional: Any, config: DsConfig | None = None, config_params: DsConfig | None = None,
               **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize, with the same arguments and the same return values: engine, optimizer, dataloader,
    lr_scheduler.

    With "pipeline_schedule" in the config, `model` must be a :class:`ds_vshape.PipelineModule` built with the same
    section, and the engine trains by that schedule. Without it the engine is DeepSpeed's own.

    Raises:
        ConfigError: on every rank, for an illegal section, for a precision, ZeRO stage or other key that no schedule
            supports (ds_vshape/config/compatibility.py), and for a model that was built with another section.
        PreflightError: on every rank, if ranks differ or can't reach each other (ds_vshape/health/preflight.py).
    """
    whole = config if config is not None else config_params if config_params is not None else _of_arguments(args)
    with _starting(model):
        section = _agreed_section(whole, model)
        with _names_of_deepspeed(section):
            return _stock_initialize(  # type: ignore[no-any-return]
                args, model, optimizer, model_parameters, *positional, config=config, config_params=config_params,
                **kwargs)


@contextmanager
def _starting(model: Any) -> Iterator[None]:
    """Around the construction of an engine, in which ranks wait for each other."""
    ours = isinstance(model, PipelineModule)
    with model.preflight.watch.phase(lambda: "initialize") if ours else nullcontext(), groups_without_limit():
        yield


def _agreed_section(whole: DsConfig | None, model: Any) -> ScheduleConfig | None:
    """The config's section; collective for a model of ours. ConfigError if `model` was built for another one."""
    section: ScheduleConfig | None = None

    def read() -> Facts:
        nonlocal section
        ds_config, section = _read(whole, model)
        return config_facts(ds_config, section)

    if isinstance(model, PipelineModule):
        model.preflight.compare(read)
    else:
        read()
    return section


def engines_for_our_models() -> None:
    """From now on make engines of the script's own subclasses of DeepSpeed's engine ours too, for models of ours."""
    StockPipelineEngine.__new__ = _new_engine


before_building.append(engines_for_our_models)


def _new_engine(engine_class: type[StockPipelineEngine], *args: Any, **kwargs: Any) -> Any:
    """Replaces object.__new__ for DeepSpeed's engine and its subclasses, with whatever arguments these take."""
    if issubclass(engine_class, PipelineEngine):
        return object.__new__(engine_class)
    model = _model_of(*args, **kwargs)
    whole = kwargs.get("config") or _of_arguments(kwargs.get("args"))
    if whole is not None:
        with _starting(model):
            section = _agreed_section(whole, model)
    else:
        section = model.schedule_config if isinstance(model, PipelineModule) else None
    return object.__new__(engine_class if section is None else _ours(engine_class, _engine_class(section)))


def _model_of(*args: Any, **kwargs: Any) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, StockPipelineModule)), None)


def _engine_class(section: ScheduleConfig) -> type[PipelineEngine]:
    return PostValidatingEngine if section.optimizer_post_validation else PipelineEngine


def _ours(of_script: type[StockPipelineEngine], ours: type[PipelineEngine]) -> Any:
    """A class with the script's methods first, where it has some, then ours."""
    if issubclass(of_script, PipelineEngine) or of_script is StockPipelineEngine:
        return of_script if issubclass(of_script, ours) else ours

    def construct(engine: Any, *args: Any, **kwargs: Any) -> None:
        with _starting(_model_of(*args, **kwargs)):
            super(made, engine).__init__(*args, **kwargs)

    # The map of a script's class lacks our instructions; its own functions are found nevertheless.
    members = {"__init__": construct, "__module__": ours.__module__, "__doc__": of_script.__doc__}
    made: Any = class_with_instructions(of_script.__name__, (of_script, ours), instructions_of(ours), members)
    return made


def _read(whole: DsConfig | None, model: Any) -> tuple[Mapping[str, Any], ScheduleConfig | None]:
    """The ds_config and its section, if `model` can be trained by it; ConfigError else."""
    ds_config = {} if whole is None else load_ds_config(whole)
    section = read_section(ds_config)
    built_for = model.schedule_config if isinstance(model, PipelineModule) else None
    if section is not None:
        check_versions()
        check_parts()
        if not isinstance(model, PipelineModule):
            of = " of DeepSpeed's" if isinstance(model, StockPipelineModule) else ""
            raise ConfigError(f"{KEY} = {section.name!r}: the model is a {type(model).__name__}{of}; build it as a "
                              "ds_vshape.PipelineModule")
        check_accepted(ds_config)
        check_monitors(ds_config)
        if dist.get_rank() == 0:
            check_monitor_folders(ds_config)
        if not get_accelerator().is_synchronized_device():
            check_asynchronous(ds_config, os.environ)
        if section.optimizer_post_validation:
            check_post_validation(ds_config)
    if section != built_for:
        raise ConfigError(f"{KEY}: the PipelineModule was built for {_shown(built_for)}, initialize's config says "
                          f"{_shown(section)}; give both the same config, the module by --deepspeed_config, the "
                          f"environment variable {ENVIRONMENT_VARIABLE} or its argument config")
    return ds_config, section


def _of_arguments(args: Any) -> DsConfig | None:
    return getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)


def _shown(section: Any) -> str:
    return "no schedule" if section is None else str(section.model_dump(exclude_defaults=True))


@contextmanager
def _names_of_deepspeed(section: ScheduleConfig | None) -> Iterator[None]:
    """deepspeed.initialize takes the engine's class, and what a pipeline is, from globals of its module
    (deepspeed/__init__.py); the first may be the script's own, the second is already ours (ds_vshape/run.py)."""
    before = deepspeed.PipelineEngine, deepspeed.PipelineModule
    if section is not None:
        deepspeed.PipelineEngine = _ours(deepspeed.PipelineEngine, _engine_class(section))
    deepspeed.PipelineModule = StockPipelineModule
    try:
        yield
    finally:
        deepspeed.PipelineEngine, deepspeed.PipelineModule = before
