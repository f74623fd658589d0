"""`ds_vshape.initialize`: deepspeed.initialize, with our engine where the config has the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
from deepspeed.runtime.pipe.engine import PipelineEngine as StockPipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule as StockPipelineModule

from ds_vshape.accepted import check_accepted, check_post_validation
from ds_vshape.config import KEY, ConfigError, DsConfig, ScheduleConfig, load_ds_config, read_section
from ds_vshape.engine import PipelineEngine
from ds_vshape.module import PipelineModule
from ds_vshape.post_validation import PostValidatingEngine
from ds_vshape.preflight import config_facts
from ds_vshape.stand_in import with_stand_in
from ds_vshape.versions import check_versions
from ds_vshape.watch import groups_without_limit


# Before anything is put in its place.
_stock_initialize = deepspeed.initialize


def initialize(args: Any = None, model: Any = None, optimizer: Any = None, model_parameters: Any = None,
               *positional: Any, config: DsConfig | None = None, config_params: DsConfig | None = None,
               **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """deepspeed.initialize, with the same arguments and the same return: engine, optimizer, dataloader, lr_scheduler.

    With "pipeline_schedule" in the config the engine is ours, and `model` must be a :class:`ds_vshape.PipelineModule`
    built with the same schedule. Without it the engine is DeepSpeed's own.

    Raises:
        ConfigError: on every rank, for a section that can't be used, a precision or ZeRO that can't be trained with
            (ds_vshape/accepted.py), or a model that was built for another schedule.
        PreflightError: on every rank, if ranks differ, or don't hear each other (ds_vshape/preflight.py).
    """
    whole = config if config is not None else config_params if config_params is not None else _of_arguments(args)
    ours = isinstance(model, PipelineModule)
    with model.preflight.watch.phase(lambda: "initialize") if ours else nullcontext(), groups_without_limit():
        if ours:
            model.preflight.compare(lambda: config_facts(*_read(whole, model)))
        section = _read(whole, model)[1]
        if section is not None:
            model_parameters = with_stand_in(model, model_parameters)
        with _names_of_deepspeed(_engine_class(section)):
            engine, *others = _stock_initialize(args, model, optimizer, model_parameters, *positional, config=config,
                                                config_params=config_params, **kwargs)
        if section is not None:
            engine.preflight()
    return engine, *others


def _engine_class(section: ScheduleConfig | None) -> type[StockPipelineEngine]:
    ours = PostValidatingEngine if section is not None and section.optimizer_post_validation else PipelineEngine
    return StockPipelineEngine if section is None else ours


def _read(whole: DsConfig | None, model: Any) -> tuple[Mapping[str, Any], ScheduleConfig | None]:
    """The ds_config and its section, if `model` can be trained by it; ConfigError else."""
    ds_config = {} if whole is None else load_ds_config(whole)
    section = read_section(ds_config)
    built_for = model.schedule_config if isinstance(model, PipelineModule) else None
    if section is not None:
        check_versions()
        if not isinstance(model, PipelineModule):
            of = " of DeepSpeed's" if isinstance(model, StockPipelineModule) else ""
            raise ConfigError(f"{KEY} = {section.name!r}: the model is a {type(model).__name__}{of}; build it as a "
                              "ds_vshape.PipelineModule")
        check_accepted(ds_config)
        if section.optimizer_post_validation:
            check_post_validation(ds_config)
    if section != built_for:
        raise ConfigError(f"{KEY}: the PipelineModule was built for {_shown(built_for)}, initialize's config says "
                          f"{_shown(section)}; give both the same config")
    return ds_config, section


def _of_arguments(args: Any) -> DsConfig | None:
    return getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)


def _shown(section: Any) -> str:
    return "no schedule" if section is None else str(section.model_dump(exclude_defaults=True))


@contextmanager
def _names_of_deepspeed(engine_class: type[StockPipelineEngine]) -> Iterator[None]:
    """deepspeed.initialize takes the engine's class, and what a pipeline is, from globals of its module
    (deepspeed/__init__.py); the second may be ours by now (ds_vshape/run.py)."""
    before = deepspeed.PipelineEngine, deepspeed.PipelineModule
    deepspeed.PipelineEngine, deepspeed.PipelineModule = engine_class, StockPipelineModule
    try:
        yield
    finally:
        deepspeed.PipelineEngine, deepspeed.PipelineModule = before
