"""A folder, a config or a model of transformers as the layers of a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ds_vshape.models.gpt import seed_layer
from ds_vshape.models.hugging_face import CHECKPOINTABLE_LAYERS, PARTITION_METHOD, load_weights, pipeline_layers
from ds_vshape.models.hugging_face.folder import read_config
from ds_vshape.models.hugging_face.weights import named_weights
from ds_vshape.plugin import PipelineModule


def topology_of(stages: int, world: int) -> PipeModelDataParallelTopology:
    """Pipelines of `stages` of `world` ranks each, 0 for one of all ranks; after it, DeepSpeed knows the ranks.

    Raises:
        ValueError: if the ranks can't be divided so, or if the Trainer doesn't know of all ranks that there are.
    """
    started = dist.get_world_size() if dist.is_initialized() else 0
    if started != world:
        raise ValueError(f"args.world_size = {world}: must be the number of ranks in the process group, {started}; "
                         "start them by a launcher (deepspeed, torchrun), and where there is no GPU set args.use_cpu = "
                         "True")
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 0 or world % (stages or world):
        raise ValueError(f"stages = {stages!r}: must divide the {world} ranks, or be 0 for a pipeline of all of them")
    stages = stages or world
    # On CPUs accelerate makes torch's process group alone.
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    return PipeModelDataParallelTopology(num_pp=stages, num_mp=1, num_dp=world // stages)


class Source:
    """What a Trainer was given as its model.

    Attributes:
        description: a model of transformers on the meta device, without data: class, config and names of the weights,
            for all that only asks what the model is.

    Raises:
        ValueError: for anything but a folder, a config or a causal language model in memory; it says what is legal.
    """

    def __init__(self, model: Any) -> None:
        self._model = Path(model) if isinstance(model, str) else model
        if isinstance(self._model, Path):
            config = read_config(self._model)
        elif isinstance(model, PreTrainedConfig):
            config = model
        elif isinstance(model, PreTrainedModel) and not getattr(model, "is_quantized", False):
            config = model.config
        else:
            raise ValueError(f"model = a {type(model).__name__}: must be a folder, or a config or a model of "
                             "transformers without adapters and quantization; launch/finetune.py trains those")
        self._padding = config.get_text_config().pad_token_id
        with torch.device("meta"):
            self.description: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), dtype=torch.float32)
        if isinstance(model, PreTrainedModel):
            if type(model) is not type(self.description):
                raise ValueError(f"model = a {type(model).__name__}: must be a {type(self.description).__name__}, the "
                                 "causal language model of its config")
            self.description.generation_config = copy.deepcopy(model.generation_config)
        elif isinstance(self._model, Path) and (self._model / "generation_config.json").is_file():
            self.description.generation_config = GenerationConfig.from_pretrained(self._model)

    def module(self, topology: PipeModelDataParallelTopology, packed: bool, recomputed: int,
               seed: int, samples_per_row: int | None, **options: Any) -> Any:
        """The PipelineModule with the model's weights (collective); of a config they are random, by `seed`.

        Args:
            packed: rows hold several samples.
            samples_per_row: the most of them.
            recomputed: after how many decoder layers activations are kept, 0 for all of them.
            options: for PipelineModule.
        """
        config = copy.deepcopy(self.description.config)
        # TRL sets it, often to the end of a text, once it has a model. An embedding learns nothing for it.
        config.get_text_config().pad_token_id = self._padding
        with torch.random.fork_rng(devices=[]):
            # seed_layers: dropout then doesn't depend on the order of the passes. dynamic_shape: collators pad each
            # micro-batch to its own longest row.
            made = PipelineModule(pipeline_layers(config, packed=packed, samples_per_row=samples_per_row),
                                  topology=topology,
                                  partition_method=PARTITION_METHOD, checkpointable_layers=CHECKPOINTABLE_LAYERS,
                                  activation_checkpoint_interval=recomputed, dynamic_shape=True, seed_layers=True,
                                  seed_fn=seed_layer, base_seed=seed, **options)
        if isinstance(self._model, Path):
            load_weights(made, self._model)
        elif isinstance(self._model, PreTrainedModel):
            state = self._model.state_dict()
            with torch.no_grad():
                for name, weight in named_weights(made).items():
                    weight.copy_(state[name])
        self._model = None  # its weights are in the module now
        return made


class OwnWeights(nn.Module):
    """The trained weights of this rank by their names in the transformers model, for create_optimizer of a Trainer. A
    rank that trains nothing has its dummy parameter under a name of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        named = {name: weight for name, weight in named_weights(module).items() if isinstance(weight, nn.Parameter)}
        known = {id(weight) for weight in named.values()}
        others = (weight for weight in module.parameters() if id(weight) not in known)
        self._named = named | {f"unnamed.{place}": weight for place, weight in enumerate(others)}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        return iter(self._named.items())


def check_groups(optimizer: torch.optim.Optimizer) -> None:
    """ValueError if a group of parameters is empty on some ranks only: ZeRO reduces norms group by group, and DeepSpeed
    removes empty ones (collective)."""
    own = [bool(group["params"]) for group in optimizer.param_groups]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    if any(other != of_ranks[0] for other in of_ranks):
        raise ValueError(f"the optimizer's groups of parameters are empty on some ranks only, by rank: {of_ranks}; "
                         "each rank must have some of each, or use an \"optimizer\" of the DeepSpeed config")
