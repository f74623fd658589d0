"""A Hugging Face model for the cost model: the costs of its layers are those of its own modules on the meta device.

It imports torch and transformers; `ds-vshape layouts --model` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ds_vshape.config.section import ConfigError
from ds_vshape.layouts.gpt_costs import Code, Shape
from ds_vshape.layouts.job import Job
from ds_vshape.layouts.job_costs import bytes_of, predict_training, speeds_of
from ds_vshape.layouts.measured import DTYPES, MeasuredTrainingCosts, autocast_for
from ds_vshape.layouts.prediction import Prediction
from ds_vshape.measure.layer_costs import Autocast, MeasuredCosts
from ds_vshape.models.hugging_face.layer_costs import layer_costs

# The default length, in tokens; less if the model has a lower limit.
_LENGTH = 4096
# The least vocabulary that a job's config may have.
_VOCABULARY = 256


class ModelFolder:
    """The model that config.json in a folder describes; its weights needn't be there.

    Raises:
        ConfigError: for a folder without a config.json that transformers can read, and for quantized weights.
    """

    def __init__(self, folder: Path, length: int | None = None) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model {folder}: holds no config.json; must be the folder of a Hugging Face model")
        try:
            self.config: Any = AutoConfig.from_pretrained(folder)
        except (ValueError, KeyError, OSError) as error:
            raise ConfigError(f"--model {folder}: {_first_line(error)}") from None
        if getattr(self.config, "quantization_config", None):
            raise ConfigError(f"--model {folder}: its config.json has a quantization_config; on quantized weights "
                              "adapters alone are trained, and layouts are those of a training of all weights: must "
                              "be the folder of the model that was quantized, or a copy of this config.json without "
                              "quantization_config")
        most = getattr(self.config, "max_position_embeddings", None) or _LENGTH
        self.length = length or min(most, _LENGTH)
        self._costs: dict[tuple[int, str, int, Autocast | None], tuple[MeasuredCosts, ...]] = {}

    @property
    def section(self) -> dict[str, Any]:
        """The section `model` of a job's config."""
        config = self.config
        return {"layers": config.num_hidden_layers, "hidden": config.hidden_size,
                # `costs` checks what tensor parallel ranks can share.
                "heads": gcd(config.hidden_size, config.num_attention_heads), "length": self.length,
                "vocabulary": max(config.vocab_size, _VOCABULARY)}

    def costs(self, samples: int, dtype: str, tensor: int,
              autocast: Autocast | None = None) -> tuple[MeasuredCosts, ...]:
        """Of each layer of the pipeline, for micro-batches of `samples` sequences.

        Raises:
            ConfigError: for a model that can't be cut into layers, or into shares for `tensor` ranks.
        """
        key = samples, dtype, tensor, autocast
        if key not in self._costs:
            try:
                self._costs[key] = layer_costs(self.config, samples, self.length, DTYPES[dtype], tensor, autocast)
            except ValueError as error:
                raise ConfigError(f"--model {self.folder}: {_first_line(error)}") from None
        return self._costs[key]

    def training(self, job: Job) -> MeasuredTrainingCosts:
        """What the cost model takes, with the stages balanced by it unless the config has bounds."""
        tensor = job.parallel.tensor
        costs = self.costs(job.data.micro_batch, job.precision.dtype, tensor, autocast_for(job))
        config = self.config
        shape = Shape(self.folder.name, config.num_hidden_layers, config.num_attention_heads, config.hidden_size,
                      job.ranks, config.vocab_size)
        training = MeasuredTrainingCosts(
            shape, speeds_of(job), self.length, job.data.micro_batch, job.micro_batches, job.parallel.pipe, tensor,
            job.replicas, bytes=bytes_of(job), costs=costs,
            code=Code(0, 0, 0, sequence_parallel=False, tied=bool(getattr(config, "tie_word_embeddings", False))))
        balanced = training.balanced(job.placement)
        assert isinstance(balanced, MeasuredTrainingCosts)
        return balanced

    def predict(self, job: Job, progress: Callable[[float], None] = lambda fraction: None) -> Prediction:
        """The batch of `job` with this model; raises ValueError as prediction.predict does, and of `costs`."""
        return predict_training(job, self.training(job), progress)


def _first_line(error: Exception) -> str:
    return str(error).strip("'\"").splitlines()[0] if str(error) else type(error).__name__
