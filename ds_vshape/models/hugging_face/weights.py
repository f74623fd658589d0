"""Weights of a Hugging Face model in safetensors, to and from the layers of a pipeline.

Each rank reads the tensors of its own layers and nothing else, of which tensor parallel ranks read their shares alone.
Each pipeline rank writes its own file:

    config.json, tokenizer files      copied from the source, with the dtype of the weights
    model-00001-of-00004.safetensors  the layers of pipeline rank 0
    ...
    model.safetensors.index.json      which file holds which tensor

The folder is one that all ranks see. What is written is what transformers' from_pretrained loads.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_vshape.deepspeed_adapter.utils import is_pipe_replicated
from ds_vshape.health.watch import in_phase
from ds_vshape.models.hugging_face.layers import Part
from ds_vshape.models.hugging_face.shared import Shared
from ds_vshape.models.hugging_face.tensor_parallel import Cut

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (Concatenate, MergeModulelist, WeightConverter, WeightRenaming,
                                                 WeightTransform, dot_natural_key, rename_source_key,
                                                 revert_weight_conversion)
except ImportError as error:
    raise ImportError("weights of Hugging Face need safetensors: pip install 'ds-vshape[models]'") from error

T = TypeVar("T")
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Copied besides the weights: the files of the tokenizer and of generation.
_COPIED = {".json", ".jinja", ".model", ".txt"}
_NOT_COPIED = {INDEX, "config.json"}
# Constants that old checkpoints hold and that transformers computes: GPT-2's causal masks, rotary frequencies.
_CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# The file of a pipeline rank.
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What peft's wrappers add to the names of a model's own weights.
_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.\w+)(?=\.)")


class Checkpoint:
    """Where the tensors of a model folder are: in one file, or in several with an index.

    Raises:
        FileNotFoundError: for a folder without safetensors.
        ValueError: for a file that can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).exists():
            with reading(folder / INDEX):
                self._file_of: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE_FILE).exists():
            with reading(folder / SINGLE_FILE), safe_open(folder / SINGLE_FILE, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE_FILE)
        else:
            raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX}")
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def read(self, name: str, opened: ExitStack, cut: Cut | None = None) -> Tensor:
        """One tensor, or a share of it, and nothing else of its file, which `opened` keeps open."""
        path = self._file_of[name]
        if path not in self._open:
            with reading(self.folder / path):
                self._open[path] = opened.enter_context(safe_open(self.folder / path, framework="pt"))
            opened.callback(self._open.pop, path)
        file = self._open[path]
        if cut is None:
            return file.get_tensor(name)  # type: ignore[no-any-return]
        try:
            return cut.take(file.get_slice(name))
        except ValueError as error:
            raise ValueError(f"{name} in {self.folder}: {error}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around what reads `path` with safetensors or json, whose errors name no file."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, in which {path.parent / INDEX} says that tensors are") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read: {type(error).__name__}: {error}; must be a whole file as transformers "
                         "writes it") from error


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of this rank's layers, by their names in the transformers model."""
    weights: dict[str, Tensor] = {}
    for part in module.modules():
        if isinstance(part, Part):
            own = {name for of in (part.module.named_parameters, part.module.named_buffers)
                   for name, _ in of(remove_duplicate=False)}
            # A layer of 4 bits saves besides these what its weight is decoded by.
            weights |= {f"{part.name}.{name}": tensor for name, tensor in part.module.state_dict(keep_vars=True).items()
                        if name in own}
    return weights


def _model_weights(module: nn.Module) -> dict[str, list[Tensor]]:
    """As named_weights, without adapters and by the names that the model has without them. A module that is trained in
    place of the model's (peft's modules_to_save) starts as its copy, so that a name may stand for two tensors."""
    of_model, weights = shared_by(module).planned.without_adapters.state_dict(), defaultdict(list)
    for name, tensor in named_weights(module).items():
        own = _WRAPPED.sub("", name)
        if own in of_model:
            weights[own].append(tensor)
    return weights


@in_phase
def load_weights(module: nn.Module, folder: Path) -> list[str]:
    """Fill this rank's layers from `folder`; to be called on every rank, before deepspeed.initialize copies them.

    Adapters keep their random weights, until load_adapter of lora_files.py reads them.

    Returns:
        The tensors in `folder` that no rank took.

    Raises:
        ValueError: if tensors are missing, or have other shapes than the config says; on every rank, like any other
            error.
    """
    of_ranks = on_all_ranks(partial(_fill, module, folder), "load its weights")
    names = frozenset().union(*(names for names, _ in of_ranks))
    taken = {source for _, sources in of_ranks for source in sources}
    return sorted(name for name in names - taken if not name.endswith(_CONSTANTS))


def _fill(module: nn.Module, folder: Path) -> tuple[frozenset[str], list[str]]:
    """Fill this rank's layers; returns the tensors in `folder`, and those that it took."""
    checkpoint = Checkpoint(folder)
    weights, shared = _model_weights(module), shared_by(module)
    four_bit = shared.planned.four_bit
    of_state = {} if four_bit is None else _states_of_weights(checkpoint.names)
    names = checkpoint.names - {name for state in of_state.values() for name in state.values()}
    own = {target: stored for target, stored in _stored(shared.planned.without_adapters, names).items()
           if target in weights}
    missing, taken = set(weights), [source for stored in own.values() for source in stored.sources]
    with ExitStack() as opened, torch.no_grad():
        for stored in own.values():
            read = partial(checkpoint.read, opened=opened)
            state = {key: read(name) for source in stored.sources for key, name in of_state.get(source, {}).items()}
            for name, tensor in stored.tensors(read, shared.cut_of).items():
                for weight in weights[name]:
                    if four_bit is not None and four_bit.is_four_bit(weight):
                        try:
                            four_bit.fill(weight, tensor, state)
                        except ValueError as error:
                            raise ValueError(f"{name} in {checkpoint.folder} is {error}") from None
                        continue
                    if tensor.shape != weight.shape:
                        cut = shared.cut_of(name)
                        found, wanted = ((list(shape) if cut is None else cut.of_shape(shape))
                                         for shape in (tensor.shape, weight.shape))
                        raise ValueError(f"{name} is {found} in {checkpoint.folder}, its config.json says {wanted}")
                    weight.copy_(tensor)
                missing.discard(name)
        taken += _copy_of_tied(shared, checkpoint, weights, opened)
    if missing:
        raise ValueError(f"{checkpoint.folder} lacks {len(missing)} tensors, {min(missing)} among them: does its "
                         "config.json belong to these weights?")
    if shared.planned.adapters is not None:
        shared.planned.adapters.set_magnitudes(module)
    return checkpoint.names, [*taken, *(name for source in taken for name in of_state.get(source, {}).values())]


def _copy_of_tied(shared: Shared, checkpoint: Checkpoint, weights: Mapping[str, list[Tensor]],
                  opened: ExitStack) -> list[str]:
    """The head's weight in the files, where the embedding's is the head's; transformers would train it if it's another
    one, so that is an error."""
    planned = shared.planned
    head, embedding = f"{planned.head}.weight", f"{planned.owner_name}.{planned.embedding}.weight"
    if not planned.is_tied or head not in checkpoint.names or embedding not in weights:
        return []
    tensor = checkpoint.read(head, opened, shared.cut_of(embedding))
    if not all(torch.equal(tensor.to(weight.dtype), weight) for weight in weights[embedding]):
        raise ValueError(f"{head} in {checkpoint.folder} isn't {embedding}, and config.json says tie_word_embeddings = "
                         "True: must be False there")
    return [head]


def _states_of_weights(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """By weights of 4 bits among tensors in files: the names of the tensors that tell how to decode them, by what they
    have behind the weight's name."""
    states: dict[str, dict[str, str]] = {}
    for name in names:
        layer, found, key = name.rpartition(".weight.")
        if found:
            states.setdefault(f"{layer}.weight", {})[key] = name
    return states


def check_output(folder: Path) -> None:
    """FileExistsError if `folder` holds weights already: old and new files together would mix two models. What a job
    has left that ended while it wrote isn't a model, for lack of an index."""
    if any(not _SHARD.fullmatch(path.name) for path in folder.glob("*.safetensors")) or (folder / INDEX).exists():
        raise FileExistsError(f"{folder} holds a model already: must be a new folder")


def remove_weights(folder: Path) -> None:
    """Remove the weights of a model in `folder`, if there is one, so that another can be written (collective)."""

    def remove() -> None:
        if dist.get_rank() == 0:
            # The index first: without it, what is left isn't a model.
            for path in [folder / INDEX, *folder.glob("model*.safetensors")]:
                path.unlink(missing_ok=True)

    on_all_ranks(remove, "remove the weights of another model")


@in_phase
def save_model(module: Any, config: Any, source: Path | None, folder: Path) -> None:
    """Write the model of `module`, a PipelineModule of Parts, as a folder like `source`; to be called on every rank.
    Without `source` it has no files besides config.json and the weights.

    Weights have the dtype in which they are trained. A tied weight is written once, and one replica writes; the first
    of tensor parallel ranks gathers the whole weights and writes them.

    Raises:
        ValueError: for a model with adapters.
        OSError: for files that can't be written; on the other ranks ValueError.
    """
    if shared_by(module).planned.adapters is not None:
        raise ValueError("the model has LoRA adapters: save_adapter of ds_vshape.models.hugging_face.lora_files writes "
                         "them, and peft's merge_and_unload makes one model of both")
    grid, ranks = module.mpu(), module.num_pipeline_stages()
    shard = f"model-{module.stage_id + 1:05}-of-{ranks:05}.safetensors"
    shared = shared_by(module)
    own = {name: whole.cpu() for name, tensor in named_weights(module).items()
           if grid.data_parallel_id == 0 and not is_pipe_replicated(tensor)
           and (whole := shared.whole(name, tensor.detach())) is not None}
    own = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(shared.planned.model, own).items()}

    def write_shard() -> dict[str, tuple[str, int]]:
        folder.mkdir(parents=True, exist_ok=True)
        if own:
            save_file(own, folder / shard, metadata={"format": "pt"})
        return {name: (shard, tensor.nbytes) for name, tensor in own.items()}

    of_ranks = on_all_ranks(write_shard, "write its weights")

    def write_others() -> None:
        if dist.get_rank():
            return
        saved = copy.deepcopy(config)
        saved.dtype = next(iter(own.values())).dtype
        saved.save_pretrained(folder)
        for path in () if source is None else source.iterdir():
            if path.suffix in _COPIED and path.name not in _NOT_COPIED:
                shutil.copy(path, folder)
        places = {name: place for of_rank in of_ranks for name, place in sorted(of_rank.items())}
        index = {"metadata": {"total_size": sum(size for _, size in places.values())},
                 "weight_map": {name: shard for name, (shard, _) in places.items()}}
        # Last: with it the model is there.
        draft = folder / f"{INDEX}.draft"
        draft.write_text(json.dumps(index, indent=2) + "\n")
        draft.replace(folder / INDEX)

    on_all_ranks(write_others, "write the model's files")


class _Stored:
    """How tensors of the model are stored in files, renamed or divided otherwise, by transformers' mapping."""

    def __init__(self, model: Any, target: str, transform: WeightTransform) -> None:
        self._model = model
        self._target = target
        self._transform: Any = transform  # transformers' types know of no tensors that are read later
        self.sources: dict[str, str] = {}  # and the pattern by which each was found

    def tensors(self, read: Callable[..., Tensor], cut_of: Callable[[str], Cut | None]) -> dict[str, Tensor]:
        """This rank's shares, by their names in the model. `read(source, cut=...)` gives what is in the file."""
        of_source = self._cut_of_source(cut_of(self._target))
        for source, pattern in self.sources.items():
            self._transform.add_tensor(self._target, source, pattern, partial(read, source, cut=of_source))
        made = self._transform.convert(self._target, model=self._model, config=self._model.config)
        tensors = {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
        if of_source is not None:
            return tensors
        return {name: tensor if (cut := cut_of(name)) is None else cut.take(tensor)
                for name, tensor in tensors.items()}

    def _cut_of_source(self, cut: Cut | None) -> Cut | None:
        """What to read of each source for a share of the target; None if the share can only be cut from the whole."""
        if cut is None or type(self._transform) is WeightRenaming:
            return cut
        # Stacking experts, and putting the weights of each one after another, keeps rows and columns.
        kept = all(isinstance(step, MergeModulelist) and step.dim == 0 or isinstance(step, Concatenate)
                   and step.dim == 1 for step in self._transform.operations)
        return replace(cut, pieces=1) if kept and cut.pieces == len(self._transform.source_patterns) else None


def _stored(model: Any, names: Iterable[str]) -> dict[str, _Stored]:
    """How transformers makes the model's tensors from the tensors `names` in files, by the name of the first one that
    each conversion makes. In a checkpoint of the base model names lack the prefix."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    of_model, prefix = model.state_dict(), model.base_model_prefix
    stored: dict[str, _Stored] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, of_model)
        if target not in of_model and name in of_model:  # stored as in the model
            target, pattern = name, None
        if target not in stored:
            transform = WeightRenaming(name, target) if pattern is None else copy.deepcopy(by_pattern[pattern])
            stored[target] = _Stored(model, target, transform)
        stored[target].sources[name] = pattern or name
    return stored


def shared_by(module: nn.Module) -> Shared:
    """What the layers share, the transformers model of which they are parts among it."""
    return next(part.shared for part in module.modules() if isinstance(part, Part))


def on_all_ranks(work: Callable[[], T], what: str) -> list[T]:
    """What `work` gives on each rank; if it raises on one, that error there and ValueError on the others. Collective.

    `what` says after "couldn't" what was tried.
    """
    if not dist.is_initialized():  # a process alone
        return [work()]
    failed, own = None, None
    try:
        own = work()
    except Exception as error:
        failed = error
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (failed and f"{type(failed).__name__}: {failed}", own))
    if failed is not None:
        raise failed
    for rank, (told, _) in enumerate(of_ranks):
        if told is not None:
            raise ValueError(f"rank {rank} couldn't {what}: {told}")
    return [of_rank for _, of_rank in of_ranks]
