"""LoRA adapters by peft, in the modules of a Hugging Face model that the pipeline's layers are made of.

peft changes the model while it is on the meta device, so that target_modules, patterns and layers_to_transform mean
what they mean for the whole model; a layer of the pipeline then copies modules that have their adapters already.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

try:
    from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
except ImportError as error:
    raise ImportError("LoRA adapters need peft: pip install 'ds-vshape[lora]'") from error

# What peft calls the only adapter of a model.
ADAPTER = "default"
# Where peft's model has the model that it is made of.
_PREFIX = "base_model.model."
# Of peft's LoraConfig: what describes the adapter, and the settings that need nothing but a layer at a time.
_DESCRIPTIONS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
                 "task_type"}
_SETTINGS = {"alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
             "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "r", "rank_pattern",
             "target_modules", "target_parameters", "use_dora", "use_rslora"}
# Others (PiSSA, OLoRA, EVA) compute adapters from the base weights or from data, before training.
_INITIAL_WEIGHTS = (True, False, "gaussian")


def check_config(config: LoraConfig) -> None:
    """Raise ValueError for a setting that a pipeline's layers can't have."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"lora = {type(config).__name__}: must be a peft.LoraConfig")
    defaults = LoraConfig()
    for name in sorted({field.name for field in dataclasses.fields(config)} - _DESCRIPTIONS - _SETTINGS):
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"LoraConfig: {name} = {getattr(config, name)!r}: must be {getattr(defaults, name)!r} in "
                             f"a pipeline, which knows {', '.join(sorted(_SETTINGS))}")
    if config.init_lora_weights not in _INITIAL_WEIGHTS:
        raise ValueError(f"LoraConfig: init_lora_weights = {config.init_lora_weights!r}: must be one of "
                         f"{', '.join(map(repr, _INITIAL_WEIGHTS))} in a pipeline")
    if config.inference_mode:
        raise ValueError("LoraConfig: inference_mode = True: must be False for training")


class Adapters:
    """Adapters put into `model`, a causal language model of transformers on the meta device, and the rest frozen.

    Raises:
        ValueError: for a config that check_config refuses, for adapters on a tied weight, and from peft, for targets
            that the model lacks.
    """

    def __init__(self, model: Any, config: LoraConfig) -> None:
        check_config(config)
        self.config = copy.deepcopy(config)
        self.config.task_type = TaskType.CAUSAL_LM
        before = model.get_input_embeddings(), model.get_output_embeddings()
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that peft uses
            self.model: Any = get_peft_model(model, self.config, ADAPTER)
        if model.config.tie_word_embeddings and (
                before != (model.get_input_embeddings(), model.get_output_embeddings())):
            raise ValueError("LoraConfig: target_modules or modules_to_save name embedding or head, which share a "
                             "weight (tie_word_embeddings = True): must leave out both")

    def draw(self, module: nn.Module) -> None:
        """Give the adapters within `module` random weights as peft does, and magnitudes where they have any."""
        for layer in _lora_layers(module):
            if self.config.init_lora_weights is not False:
                layer.reset_lora_parameters(ADAPTER, self.config.init_lora_weights)
                continue
            for linear in (layer.lora_A, layer.lora_B):
                if ADAPTER in linear:
                    linear[ADAPTER].reset_parameters()
            for weights in (layer.lora_embedding_A, layer.lora_embedding_B):
                if ADAPTER in weights:
                    nn.init.normal_(weights[ADAPTER])
        self.set_magnitudes(module)

    @torch.no_grad()
    def set_magnitudes(self, module: nn.Module) -> None:
        """DoRA: set the first magnitudes, which follow from the base weights (peft's lora/dora.py)."""
        for layer in _lora_layers(module):
            for name, magnitude in (getattr(layer, "lora_magnitude_vector", None) or {}).items():
                a, b = ((layer.lora_embedding_A[name], layer.lora_embedding_B[name])
                        if name in layer.lora_embedding_A else (layer.lora_A[name].weight, layer.lora_B[name].weight))
                magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b,
                                       scaling=layer.scaling[name])

    def stored_names(self) -> dict[str, str]:
        """The names in the model of what peft stores in a file, by their names there."""
        weights = self.model.state_dict(keep_vars=True)
        name_of = {id(tensor): name.removeprefix(_PREFIX) for name, tensor in weights.items()}
        stored = get_peft_model_state_dict(self.model, weights, ADAPTER, save_embedding_layers=False)
        return {name: name_of[id(tensor)] for name, tensor in stored.items()}


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within it, this rank's layers compute what they do without their adapters (and modules_to_save), as
    PeftModel.disable_adapter does. No gradients may be computed meanwhile."""
    adapted = [part for part in module.modules() if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for part in adapted:
        part.enable_adapters(False)
    try:
        yield
    finally:
        for part in adapted:
            part.enable_adapters(True)


def _lora_layers(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, LoraLayer)]
