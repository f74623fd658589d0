"""LoRA adapters in peft's own files, to and from the layers of a pipeline:

    adapter_config.json          the LoraConfig
    adapter_model.safetensors    the adapters of all layers, and what else is trained

The folder is one that all ranks see. What is written is what peft's PeftModel.from_pretrained loads.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_vshape.health.watch import in_phase
from ds_vshape.models.hugging_face.lora import Adapters
from ds_vshape.models.hugging_face.weights import named_weights, on_all_ranks, reading, shared_by

try:
    from peft import LoraConfig, PeftConfig
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError("files of LoRA adapters need peft: pip install 'ds-vshape[lora]'") from error


def read_config(folder: Path) -> LoraConfig:
    """The settings of adapters in `folder`, for training.

    Raises:
        FileNotFoundError: for a folder without adapter_config.json.
        ValueError: if it isn't LoRA's.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder / CONFIG_NAME}: peft_type = {config.peft_type}: must be LORA")
    config.inference_mode = False
    return config


def has_adapter(folder: Path) -> bool:
    """Whether there are weights in `folder`, and not only settings."""
    return (folder / SAFETENSORS_WEIGHTS_NAME).is_file()


@in_phase
def load_adapter(module: nn.Module, folder: Path) -> None:
    """Fill the adapters of this rank's layers from `folder`; to be called on every rank, after load_weights and before
    deepspeed.initialize.

    Raises:
        FileNotFoundError: for a folder without adapter_model.safetensors.
        ValueError: if the model has no adapters, or others than `folder`; on every rank, like any other error.
    """
    path, own, names = folder / SAFETENSORS_WEIGHTS_NAME, named_weights(module), _adapters(module).stored_names()

    def fill() -> None:
        if not has_adapter(folder):
            raise FileNotFoundError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}")
        with ExitStack() as opened, torch.no_grad():
            with reading(path):
                file = opened.enter_context(safe_open(path, framework="pt"))
            stored = set(file.keys())
            for others, what in ((names.keys() - stored, "lacks"),
                                 (stored - names.keys(), "holds besides the model's")):
                if others:
                    raise ValueError(f"{path} {what} {len(others)} tensors, {min(others)} among them: do its adapters "
                                     "belong to this model and this LoraConfig?")
            for name, in_model in names.items():
                if in_model not in own:
                    continue
                tensor, weight = file.get_tensor(name), own[in_model]
                if tensor.shape != weight.shape:
                    raise ValueError(f"{name} is {list(tensor.shape)} in {path}, and {list(weight.shape)} in the model")
                weight.copy_(tensor)

    on_all_ranks(fill, "load its adapters")


@in_phase
def save_adapter(module: Any, source: Path, folder: Path) -> None:
    """Write the adapters of `module`, a PipelineModule of adapted layers, into `folder`; to be called on every rank.

    Rank 0 gathers and writes them, in the dtype in which they are trained. `source`, the folder of the base model, is
    noted in adapter_config.json.

    Raises:
        ValueError: if the model has no adapters.
        OSError: for files that can't be written, on rank 0; on the others ValueError.
    """
    adapters, weights = _adapters(module), named_weights(module)
    own = {name: weights[in_model].detach().cpu().contiguous() for name, in_model in adapters.stored_names().items()
           if in_model in weights and module.mpu().data_parallel_id == 0}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(own, of_ranks if dist.get_rank() == 0 else None)

    def write() -> None:
        if dist.get_rank():
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.copy(adapters.config)
        config.inference_mode, config.base_model_name_or_path = True, str(source)
        config.save_pretrained(str(folder))
        # Last, and at once: with it the adapters are there.
        draft = folder / f"{SAFETENSORS_WEIGHTS_NAME}.draft"
        save_file({name: tensor for of_rank in of_ranks for name, tensor in of_rank.items()}, draft,
                  metadata={"format": "pt"})
        draft.replace(folder / SAFETENSORS_WEIGHTS_NAME)

    on_all_ranks(write, "write the adapters")


def _adapters(module: nn.Module) -> Adapters:
    adapters = shared_by(module).planned.adapters
    if adapters is None:
        raise ValueError("the model has no adapters: must be made by pipeline_layers(config, lora=...)")
    return adapters
