"""Settings from overrides like "length=512 schedule=v-zb" and from a config, which hydra composes.

configs/finetune.yaml has all keys, with their defaults. A config of a user's own extends it:

    defaults: [finetune, _self_, {override /schedule: v-zb}]
    model: runs/tiny-chat
    output: runs/tuned-chat
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ds_vshape.config.section import ConfigError, ScheduleConfig, TraceConfig
from ds_vshape.finetuning.settings import EngineSettings, Settings, read_settings
from ds_vshape.layouts.composition import CONFIGS, check_keys, compose_config, parse_overrides
from ds_vshape.layouts.rules import section_of, unknown_key

NAME = "finetune"


def compose_settings(overrides: Sequence[str], options: Mapping[str, Any],
                     config: Path | None = None) -> tuple[Settings, str | dict[str, Any]]:
    """The settings of a `config` (None: configs/finetune.yaml) with `overrides` and `options`, and the ds_config.

    Raises:
        ConfigError: for what can't be used, and for a key that is given twice.
    """
    check_keys(overrides, legal_keys())
    parsed = {override.key_or_group: override for override in parse_overrides(overrides)}
    twice = [key for key in parsed if key in options]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: as --{twice[0]} and as {parsed[twice[0]].input_line}")
    # hydra would take "model" and "data" for the groups of the main job.
    own = {key: override.value() for key, override in parsed.items() if key in Settings.model_fields}
    others = [str(override.input_line) for key, override in parsed.items() if key not in own]
    configs, name = CONFIGS, NAME
    if config is not None:
        if config.suffix != ".yaml" or not config.is_file():
            raise ConfigError(f"--config {config}: must be a file *.yaml")
        configs, name = config.parent, config.stem
        others.append(f"hydra.searchpath=[file://{CONFIGS}]")
    values = {key: str(value) if isinstance(value, Path) else value for key, value in {**own, **options}.items()}
    composed = compose_config(name, others, configs, values)
    plain = {key: composed.pop(key) for key in Settings.model_fields if key in composed}
    for key, value in composed.items():
        if key not in EngineSettings.model_fields:
            raise unknown_key(key, value, legal_keys())
    settings = read_settings(plain)
    if settings.deepspeed_config is None:
        return settings, section_of(EngineSettings, composed).ds_config()
    unused = next((key for key in parsed if key not in own), None)
    if unused is not None:
        raise ConfigError(f"{parsed[unused].input_line}: with deepspeed_config = {settings.deepspeed_config} that file "
                          "says it; legal: one of the two")
    return settings, str(settings.deepspeed_config)


def legal_keys() -> list[str]:
    """Every key of a fine-tuning, with dots."""
    keys = list(Settings.model_fields)
    for name, field in EngineSettings.model_fields.items():
        keys.append(name)
        kind = ScheduleConfig if name == "schedule" else field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{name}.{key}" for key in kind.model_fields]
    return keys + [f"schedule.trace.{key}" for key in TraceConfig.model_fields]
