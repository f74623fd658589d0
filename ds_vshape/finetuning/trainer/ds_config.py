"""The DeepSpeed config of a pipeline's engine, from the file that TrainingArguments name and their own values.

As with the Trainer, "auto" stands for what TrainingArguments say. So does a missing key of those that must agree: there
DeepSpeed's default would silently differ.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from ds_vshape.config.compatibility import check_accepted
from ds_vshape.config.section import KEY, ConfigError, load_ds_config, read_section, shown

_AUTO = "auto"
_BATCH = "train_batch_size"
_AGREEING = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_PRECISIONS = ("bf16", "fp16")


class EngineConfig:
    """The config of an engine with `replicas` pipelines.

    Raises:
        ConfigError: without "pipeline_schedule", for what no schedule supports, and for values that differ from those
            of TrainingArguments.
    """

    def __init__(self, args: Any, replicas: int) -> None:
        asked: dict[str, Any] = copy.deepcopy(dict(load_ds_config(args.deepspeed)))
        if read_section(asked) is None:
            raise ConfigError(f"{KEY} is missing in the config {shown(args.deepspeed)}: PipelineTrainer needs a "
                              'schedule, for example "v-half"')
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * replicas
        given = asked.pop(_BATCH, _AUTO)
        if given not in (_AUTO, rows):
            raise ConfigError(f"{_BATCH} = {shown(given)}: must be {rows}, which is per_device_train_batch_size x "
                              f"gradient_accumulation_steps x {replicas} pipelines, or {_AUTO!r}")
        for key in _AGREEING:
            asked.setdefault(key, _AUTO)
        for key in _PRECISIONS:
            asked.setdefault(key, {"enabled": _AUTO})
        self._args = args
        self._filled = HfTrainerDeepSpeedConfig(asked)  # type: ignore[no-untyped-call]
        self._filled.trainer_config_process(args)  # type: ignore[no-untyped-call]
        self._filled.config[_BATCH] = rows
        if self._filled.mismatches:
            found = "; ".join(text.removeprefix("- ") for text in self._filled.mismatches)
            raise ConfigError(f"the DeepSpeed config (ds) differs from TrainingArguments (hf): {found}; must be equal, "
                              f"or {_AUTO!r} in the config")
        check_accepted(self._filled.config)

    @property
    def of_module(self) -> dict[str, Any]:
        """What the PipelineModule needs to know of it."""
        return self._filled.config  # type: ignore[no-any-return]

    def of_engine(self, model: Any, steps: int) -> dict[str, Any]:
        """The whole config, for a training of so many steps, which a scheduler's "auto" stands for.

        Raises:
            ValueError: for a scheduler whose steps differ from those of TrainingArguments; it names both.
        """
        self._filled.trainer_config_finalize(self._args, model, steps)  # type: ignore[no-untyped-call]
        return self._filled.config  # type: ignore[no-any-return]
