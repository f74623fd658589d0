"""Weights of a Hugging Face model in safetensors, to and from the layers of a pipeline.

Each rank reads the tensors of its own layers and nothing else, and writes its own file:

    config.json, tokenizer files      copied from the source, with the dtype of the weights
    model-00001-of-00004.safetensors  the layers of pipeline rank 0
    ...
    model.safetensors.index.json      which file holds which tensor

The folder is one that all ranks see. What is written is what transformers' from_pretrained loads.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from ds_vshape.models.hugging_face import Part

try:
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError("weights of Hugging Face need safetensors: pip install 'ds-vshape[models]'") from error

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Copied besides the weights: the files of the tokenizer and of generation.
_COPIED = {".json", ".jinja", ".model", ".txt"}
_NOT_COPIED = {INDEX, "config.json"}
# Constants that old checkpoints hold and that transformers computes: GPT-2's causal masks, rotary frequencies.
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class Checkpoint:
    """Where the tensors of a model folder are: in one file, or in several with an index.

    Raises:
        FileNotFoundError: for a folder without safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            self._file_of: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE_FILE).exists():
            with safe_open(folder / SINGLE_FILE, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE_FILE)
        else:
            raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX}")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def find(self, name: str) -> str | None:
        """The name of the tensor in this folder: a checkpoint of the base model lacks the prefix."""
        candidates = (name, name.partition(".")[2])
        return next((candidate for candidate in candidates if candidate in self._file_of), None)

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, one after the other, each file opened once and nothing else read."""
        by_file = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        for path, names_there in by_file.items():
            with safe_open(self.folder / path, framework="pt") as file:
                for name in names_there:
                    yield name, file.get_tensor(name)


def named_weights(module: nn.Module) -> dict[str, Parameter]:
    """The parameters of this rank's layers, by their names in the transformers model."""
    return {f"{part.name}.{name}": parameter
            for part in module.modules() if isinstance(part, Part)
            for name, parameter in part.module.named_parameters()}


def load_weights(module: nn.Module, folder: Path) -> list[str]:
    """Fill this rank's layers from `folder`; to be called on every rank, before deepspeed.initialize copies them.

    Returns:
        The tensors in `folder` that no rank took.

    Raises:
        ValueError: if tensors are missing, or have other shapes than the config says.
    """
    checkpoint, weights = Checkpoint(folder), named_weights(module)
    places, missing = {}, []
    for name, parameter in weights.items():
        stored = checkpoint.find(name)
        if stored is None:
            missing.append(name)
        else:
            places[stored] = parameter
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, {missing[0]} among them: does its config.json belong "
                         "to these weights?")
    with torch.no_grad():
        for name, tensor in checkpoint.read(list(places)):
            if tensor.shape != places[name].shape:
                raise ValueError(f"{name} is {list(tensor.shape)} in {folder}, its config.json says "
                                 f"{list(places[name].shape)}")
            places[name].copy_(tensor)
    taken = set().union(*_of_all_ranks(list(places)))
    return sorted(name for name in checkpoint.names - taken if not name.endswith(_CONSTANTS))


def check_output(folder: Path) -> None:
    """FileExistsError if `folder` holds weights already: old and new files together would mix two models."""
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        raise FileExistsError(f"{folder} holds a model already: must be a new folder")


def save_model(module: Any, config: Any, source: Path, folder: Path) -> None:
    """Write the model of `module`, a PipelineModule of Parts, as a folder like `source`; to be called on every rank.

    Weights have the dtype in which they are trained. A tied weight is written once, and one replica writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid, ranks = module.mpu(), module.num_pipeline_stages()
    shard = f"model-{module.stage_id + 1:05}-of-{ranks:05}.safetensors"
    own = {name: parameter.detach().cpu().contiguous() for name, parameter in named_weights(module).items()
           if grid.data_parallel_id == 0 and not parameter.ds_pipe_replicated}  # type: ignore[attr-defined]
    if own:
        save_file(own, folder / shard, metadata={"format": "pt"})
    of_ranks = _of_all_ranks({name: (shard, tensor.nbytes) for name, tensor in own.items()})
    if dist.get_rank() == 0:
        places = {name: place for of_rank in of_ranks for name, place in sorted(of_rank.items())}
        index = {"metadata": {"total_size": sum(size for _, size in places.values())},
                 "weight_map": {name: shard for name, (shard, _) in places.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config = copy.deepcopy(config)
        config.dtype = next(iter(own.values())).dtype
        config.save_pretrained(folder)
        for path in source.iterdir():
            if path.suffix in _COPIED and path.name not in _NOT_COPIED:
                shutil.copy(path, folder)
    dist.barrier()


def _of_all_ranks(own: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered
