"""Which modules of a Hugging Face model make which layer of the pipeline: transformers' plan, read.

A plan names the modules of the base model in the order in which they run, each with what it takes and what it returns:

    {"embed_tokens": (["input_ids"], ["inputs_embeds"]),
     "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
     "norm": (["hidden_states"], ["hidden_states"])}

transformers keeps it in config.base_model_pp_plan; PLANS holds those of families to which it gives none.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

try:
    from transformers import AutoModelForCausalLM, PreTrainedConfig
    from transformers.initialization import guard_torch_init_functions
except ImportError as error:
    raise ImportError("models of Hugging Face need transformers: pip install 'ds-vshape[models]'") from error

if TYPE_CHECKING:
    from peft import LoraConfig

    from ds_vshape.models.hugging_face.lora import Adapters

Plan = dict[str, tuple[list[str], list[str]]]

_HIDDEN = (["hidden_states"], ["hidden_states"])
_LAYER = (["hidden_states", "attention_mask"], ["hidden_states"])
_HIDDEN_NAMES = ("inputs_embeds", "hidden_states")
_MISSING = object()
# By config.model_type.
PLANS: dict[str, Plan] = {
    "gpt2": {"wte": (["input_ids"], ["inputs_embeds"]), "wpe": (["position_ids"], ["position_embeds"]),
             "drop": _HIDDEN, "h": _LAYER, "ln_f": _HIDDEN},
    "opt": {"decoder.embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "decoder.embed_positions": (["attention_mask"], ["position_embeds"]),
            "decoder.project_in": (["inputs_embeds"], ["inputs_embeds"]), "decoder.layers": _LAYER,
            "decoder.final_layer_norm": _HIDDEN, "decoder.project_out": _HIDDEN},
}


@dataclass(frozen=True)
class Router:
    """Modules within decoder layers whose outputs the router loss of an MoE needs: `index` is their place in the
    output of the module."""

    kind: type[nn.Module]
    index: int
    place: str

    def is_one(self, name: str, module: nn.Module) -> bool:
        return isinstance(module, self.kind) and (not self.place or f".{self.place}." in f".{name}.")


class PlannedModel:
    """A causal language model on the meta device, with what its plan says of its modules.

    Modules within the owner, the module whose forward runs the layers, are called by their names there.

    Args:
        attention: "sdpa" or "eager"; by default transformers chooses.
        plan: instead of transformers' or ours.
        experts: "grouped_mm", "batched_mm" or "eager"; by default transformers chooses.
        lora: adapters to put into the model.
        quantization: the settings of a BitsAndBytesConfig, for layers of 4 bits where transformers would have them.

    Raises:
        ValueError: for a model without a plan, for one that can't be cut by its plan, and for adapters that it can't
            have.
        ImportError: for adapters without peft, and for quantization without bitsandbytes.
    """

    def __init__(self, config: PreTrainedConfig, attention: str | None = None, plan: Plan | None = None,
                 experts: str | None = None, lora: LoraConfig | None = None,
                 quantization: dict[str, Any] | None = None) -> None:
        plan = plan or getattr(config, "base_model_pp_plan", None) or PLANS.get(config.model_type)
        if plan is None:
            raise ValueError(
                f"model_type = {config.model_type!r}: neither transformers (config.base_model_pp_plan) nor ds_vshape "
                "has a plan for its pipeline; must be a decoder with one, or give pipeline_layers(config, plan=...) "
                "the modules of the base model in the order in which they run, as {'embed_tokens': (['input_ids'], "
                "['inputs_embeds']), 'layers': (['hidden_states', 'attention_mask'], ['hidden_states']), 'norm': "
                "(['hidden_states'], ['hidden_states'])}")
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention,
                experts_implementation=experts)
        # Whether the layers that are built from now on stay on the meta device, where they have no data.
        self.on_meta = False
        self.four_bit = None if quantization is None else _four_bit()
        if quantization is not None and self.four_bit is not None:
            self.four_bit.replace_linears(self.model, quantization)
        # As its files know it; peft changes it in place.
        self.without_adapters: Any = self.model if lora is None else _copy_on_meta(self.model)
        with nullcontext() if self.four_bit is None else self.four_bit.decodable(self.model):
            self.adapters = None if lora is None else _adapters(self.model, lora)
        if self.four_bit is not None:
            self.four_bit.check_frozen(self.model)
        self.config = self.model.config
        self.model_type = config.model_type
        base: Any = self.model.base_model
        unknown = [name for name in plan if _at(base, name, _MISSING) is _MISSING]
        if base is self.model or unknown:
            raise ValueError(f"model_type = {self.model_type!r}: {type(base).__name__} has no {', '.join(unknown)}; "
                             "its plan must name modules of the base model")
        repeated = [name for name in plan if isinstance(_at(base, name), nn.ModuleList)]
        if len(repeated) != 1:
            raise ValueError(f"model_type = {self.model_type!r}: its plan must name one list of layers, it names "
                             f"{len(repeated)}: {', '.join(plan)}")
        path, _, layers = repeated[0].rpartition(".")
        self.layers: str = layers
        self.owner: Any = base.get_submodule(path)
        self.owner_name = ".".join(filter(None, (self.model.base_model_prefix, path)))
        # A family's plan names modules too that some of its models lack.
        there = [name.removeprefix(f"{path}.") for name in plan if _at(base, name) is not None]
        # Modules that are given ids or masks, and what they return is added to embeddings.
        self.of_ids = {name.removeprefix(f"{path}.") for name, ((first, *_), _) in plan.items()
                       if first not in _HIDDEN_NAMES}
        place = there.index(self.layers)
        self.embedding = self._name_in_owner(self.model.get_input_embeddings())
        self.before = [name for name in there[:place] if name != self.embedding]
        self.after = there[place + 1:]
        self.head = next(name for name, module in self.model.named_children()
                         if module is self.model.get_output_embeddings())
        self.is_tied = bool(getattr(config, "tie_word_embeddings", False))
        self._check_parameters()
        self.routers = _routers(self.model) if getattr(self.config, "output_router_logits", False) else []

    @property
    def modules_of_layers(self) -> frozenset[str]:
        """The modules of the owner that layers of the pipeline hold."""
        return frozenset({self.embedding, *self.before, self.layers, *self.after})

    def made(self, module: nn.Module) -> Any:
        """A copy of a module of the model on the CPU, with random weights as transformers draws them; or, if `on_meta`,
        without any."""
        made: Any = _copy_on_meta(module)
        if self.on_meta:
            return made
        whole: AbstractContextManager[None] = (nullcontext() if self.four_bit is None
                                               else self.four_bit.whole_while_drawn(made))
        with whole, torch.no_grad(), guard_torch_init_functions():
            made = made.to_empty(device="cpu")
            made.apply(self.model._init_weights)
        if self.adapters is not None:
            self.adapters.draw(made)
        unset = {name: buffer for name, buffer in made.named_buffers() if not buffer._version}
        for name in unset.keys() & made.state_dict().keys():  # files hold it, and nothing else tells what it is
            unset.pop(name).fill_(torch.nan)
        if unset:
            raise ValueError(f"model_type = {self.model_type!r}: transformers doesn't say how to compute "
                             f"{', '.join(unset)} of {type(module).__name__}")
        return made

    def routers_in(self, layer: nn.Module) -> list[tuple[nn.Module, int]]:
        """The routers within a decoder layer, with the places of their logits in what they return."""
        return [(module, router.index) for name, module in layer.named_modules() for router in self.routers
                if router.is_one(name, module)]

    def _name_in_owner(self, module: nn.Module) -> str:
        return next(str(name) for name, child in self.owner.named_children() if child is module)

    def _check_parameters(self) -> None:
        """Every parameter lies in one layer of the pipeline; the embedding alone may be in two."""
        if self.is_tied and self.model.get_output_embeddings().bias is not None:
            raise ValueError(f"model_type = {self.model_type!r}: a head with a bias can't be tied to the embedding, "
                             "must be tie_word_embeddings = False")
        prefixes = tuple(f"{self.owner_name}.{name}." for name in self.modules_of_layers) + (f"{self.head}.",)
        names = [name for name, _ in self.model.named_parameters()]
        others = [name for name in names if not name.startswith(prefixes)]
        if others:
            raise ValueError(f"model_type = {self.model_type!r}: its plan leaves out {', '.join(others[:3])}; every "
                             "parameter must belong to a module of the plan")
        uses = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        tied = {id(self.model.get_input_embeddings().weight)} if self.is_tied else set()
        shared = [name for name, parameter in self.model.named_parameters()
                  if uses[id(parameter)] > 1 and id(parameter) not in tied]
        if shared:
            raise ValueError(f"model_type = {self.model_type!r}: {shared[0]} is used in several places; embedding and "
                             "head alone may share a weight")


def _adapters(model: Any, config: LoraConfig) -> Adapters:
    from ds_vshape.models.hugging_face.lora import Adapters  # peft is an extra

    return Adapters(model, config)


def _copy_on_meta(module: nn.Module) -> Any:
    """Of a module on the meta device, where weights of 4 bits can be copied only if it is the default one."""
    with torch.device("meta"):
        return copy.deepcopy(module)


def _four_bit() -> Any:
    from ds_vshape.models.hugging_face import four_bit  # bitsandbytes is an extra

    return four_bit


def tensors_in(arguments: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries of arguments."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [tensor for argument in arguments for tensor in tensors_in(argument)]
    return []


def _at(module: Any, name: str, missing: object = None) -> Any:
    """What `name`, with dots, stands for in a module: None where the model has none."""
    for part in name.split("."):
        module = getattr(module, part, missing)
    return module


def _routers(model: Any) -> list[Router]:
    recorders = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", [])
    return [Router(getattr(recorder, "target_class", None) or recorder, getattr(recorder, "index", 1),
                   getattr(recorder, "layer_name", None) or "")
            for recorder in (recorders if isinstance(recorders, list) else [recorders])]
