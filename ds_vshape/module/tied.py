"""Tied layers (TiedLayerSpec), on any ranks.

DeepSpeed (runtime/pipe/module.py and engine.py) assumes that the lowest rank with such a layer owns its weights, which
is right while the ranks are in the order of the layers. In a V a later layer may be on a lower rank:

    initial weights       come from the first layer, as in the model on one rank, whichever rank holds it
    weights from a file   come from the layer that has a file: a layer with a forward_fn has none, unless all have a
                          forward_fn; then the first layer gets the file (DeepSpeed would save none)

Layers of one key on one rank are a single module, made from the first layer's arguments; layers on other ranks get its
weights byte for byte. So the arguments of all must be equal, which DeepSpeed doesn't check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import TiedLayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from torch import nn


@dataclass(frozen=True)
class Tie:
    """The layers of one key."""

    layers: tuple[int, ...]
    # The first layer without a forward_fn, for which DeepSpeed writes a file.
    plain: int | None

    @property
    def first(self) -> int:
        """The layer whose seed initializes the weights."""
        return self.layers[0]

    @property
    def filed(self) -> int:
        """The layer whose file contains the weights."""
        return self.layers[0] if self.plain is None else self.plain


def find_ties(specs: Sequence[Any]) -> dict[str, Tie]:
    """The ties of a PipelineModule's layers, by key."""
    layers: dict[str, list[int]] = {}
    plain: dict[str, int] = {}
    for number, spec in enumerate(specs):
        if isinstance(spec, TiedLayerSpec):
            layers.setdefault(spec.key, []).append(number)
            if spec.forward_fn is None:
                plain.setdefault(spec.key, number)
    return {key: Tie(tuple(numbers), plain.get(key)) for key, numbers in layers.items()}


def joined(sets: Iterable[Iterable[int]]) -> list[set[int]]:
    """The union of all sets that overlap, in the order of their smallest members."""
    found: list[set[int]] = []
    for members in sets:
        whole = set(members)
        for other in [other for other in found if other & whole]:
            found.remove(other)
            whole |= other
        found.append(whole)
    return sorted(found, key=min)


def check_one_module(key: str, layers: Sequence[tuple[int, TiedLayerSpec]]) -> None:
    """Raise PipelineError if layers (number and spec) on one rank differ in their class or arguments."""
    for number, spec in layers[1:]:
        first, other = layers[0][1], spec
        if first.typename is not other.typename or _differ(first.module_args, other.module_args) or (
                _differ(first.module_kwargs, other.module_kwargs)):
            raise PipelineError(f"tied layers {key!r}: layer {layers[0][0]} is {_shown(first)}, and layer {number} on "
                                f"the same rank {_shown(other)}; they must be equal; give the second a "
                                "forward_fn if it computes something else")


def check_has(module: nn.Module, key: str, names: Sequence[str]) -> None:
    """Raise PipelineError unless `module` has all weights `names`."""
    weights = dict(module.named_parameters())
    for name in names:
        if name not in weights:
            raise PipelineError(f"tied layers {key!r}: tied_weight_attr = {name!r}, but {type(module).__name__} has "
                                f"{', '.join(weights) or 'no weights'}")


def shapes_of(modules: Mapping[str, nn.Module], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The shapes of this rank's tied weights, by key and name."""
    return {f"{key}.{name}": list(modules[key].get_parameter(name).shape)
            for key in modules for name in names[key]}


def check_shapes(of_ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise PipelineError if the shapes of a tied weight differ between ranks; `of_ranks` has `shapes_of` of each."""
    for weight in sorted({weight for shapes in of_ranks for weight in shapes}):
        having = {rank: shapes[weight] for rank, shapes in enumerate(of_ranks) if weight in shapes}
        if any(shape != next(iter(having.values())) for shape in having.values()):
            shown = ", ".join(f"{shape} on rank {rank}" for rank, shape in having.items())
            raise PipelineError(f"tied weight {weight} has different shapes: {shown}")


def _differ(first: Any, other: Any) -> bool:
    """Whether two arguments are plain data and differ; other arguments can't be compared."""
    if isinstance(first, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(first) != len(other) or any(map(_differ, first, other))
    if isinstance(first, dict) and isinstance(other, dict):
        return first.keys() != other.keys() or any(_differ(first[name], other[name]) for name in first)
    plain = (bool, int, float, str, type(None))
    return isinstance(first, plain) and isinstance(other, plain) and first != other


def _shown(spec: TiedLayerSpec) -> str:
    arguments = [*map(repr, spec.module_args), *(f"{name}={value!r}" for name, value in spec.module_kwargs.items())]
    return f"{spec.typename.__name__}({', '.join(arguments)})"
