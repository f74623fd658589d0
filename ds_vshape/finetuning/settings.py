"""What a fine-tuning is told: one table of settings, for options (`--length 512`), for words (`length=512`) and for
configs (`length: 512`).

A setting that isn't in the table is refused, and so is one that would have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ds_vshape.config.section import KEY, ConfigError, read_section
from ds_vshape.layouts.job import OWN_ENGINE, Count, Optimizer, Precision, Section, compose_ds_config
from ds_vshape.layouts.rules import section_of

Whole = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
# Of transformers' schedules those that need no more than warmup and the number of batches.
RateSchedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt"]
# Enough for the loss to fall clearly.
BATCHES = 30


class Settings(Section):
    """The settings of launch/finetune.py, each with its explanation and its default."""

    model: Path = Field(description="folder with config.json and safetensors")
    output: Path = Field(description="new folder for the trained model")
    lora: Path | None = Field(None, description="folder with adapter_config.json: train adapters, not the model")
    text: Path | None = Field(None, description="folder with .py files (default: Python's own standard library)")
    data: Path | None = Field(None, description="instead of text: .jsonl, .json or .parquet with \"text\" or "
                              "\"messages\", or a folder of datasets")
    validation: Path | None = Field(None, description="the same for evaluation (default: a twentieth of the data)")
    packed: bool = Field(False, description="several samples of the data in each row")
    length: AtLeastOne = Field(128, description="tokens in a row, at most")
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="how often to train on the data, instead of batches")
    batches: AtLeastOne | None = Field(None, description=f"the number of batches (default: {BATCHES}, without epochs)")
    learning_rate: RateSchedule | None = Field(None, description="how it changes over all batches, linear, cosine or "
                                               "another of transformers' schedules (default: as the ds_config says)")
    warmup: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="its share of the batches")
    evaluate_every: Whole = Field(0, description="batches between evaluations (default: after the last one alone)")
    checkpoints: Path | None = Field(None, description="folder for checkpoints, from whose last one training goes on")
    save_every: Whole = Field(0, description="batches between checkpoints")
    stages: Whole = Field(0, description="pipeline ranks (default: all ranks)")
    tensor_parallel: AtLeastOne = Field(1, description="ranks that share each layer")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="by default transformers chooses; flash attention must be installed")
    experts: Literal["grouped_mm", "batched_mm", "eager"] | None = Field(
        None, description="how the experts of a mixture are computed; by default transformers chooses")
    chunked_head: bool = Field(False, description="compute logits for some tokens at a time, which saves their memory")
    result: Path | None = Field(None, description="where rank 0 writes what it measured, as JSON")
    deepspeed_config: Path | None = Field(None, description="a ds_config file (default: composed from the groups of "
                                          "configs/)")


class Batch(Section):
    """Rows of a micro-batch, and how many micro-batches each replica has of a batch."""

    micro_batch: Count
    micro_batches: Count


class Sharing(Section):
    """How much replicas share: ZeRO's stage."""

    zero: Literal[0, 1]


class EngineSettings(Section):
    """What a ds_config is composed from. `schedule` is the "pipeline_schedule" section, `deepspeed` other keys."""

    schedule: dict[str, Any]
    precision: Precision
    optimizer: Optimizer
    batch: Batch
    parallel: Sharing
    deepspeed: dict[str, Any]

    def ds_config(self) -> dict[str, Any]:
        """What deepspeed.initialize gets; ConfigError for a schedule that isn't legal."""
        section: dict[str, Any] | None = {key: value for key, value in self.schedule.items() if value is not None}
        if section == {"name": OWN_ENGINE}:
            section = None
        else:
            try:
                read_section({KEY: section})
            except ConfigError as error:  # the section has another name here
                raise ConfigError(str(error).replace(f"{KEY}.", "schedule.")) from None
        return compose_ds_config(section, self.batch.micro_batch, self.batch.micro_batches, self.optimizer,
                                 self.parallel.zero, self.precision, self.deepspeed)


# Settings that would be passed over in silence, each with the one that it needs.
_NEEDED = {"save_every": "checkpoints", "validation": "data", "packed": "data", "warmup": "learning_rate"}


def read_settings(values: Mapping[str, Any]) -> Settings:
    """The settings of `values`, by key; ConfigError for what can't be used."""
    settings = section_of(Settings, values)
    for key, needed in _NEEDED.items():
        if getattr(settings, key) and not getattr(settings, needed):
            raise ConfigError(f"{key} = {_shown(getattr(settings, key))}: must come with {needed}")
    if settings.epochs is not None and settings.batches is not None:
        raise ConfigError(f"epochs = {settings.epochs} and batches = {settings.batches}: legal is one of the two")
    return settings


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path) else repr(value)
