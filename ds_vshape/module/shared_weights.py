"""Weights that several layers hold without a TiedLayerSpec.

DeepSpeed builds each rank's layers in a separate process. A module or a Parameter that two layers share is one weight
if both are on one rank; otherwise it becomes two weights that diverge, so the trained model depends on the placement.
DeepSpeed doesn't warn about it. In a model in one process it is always one weight.

Every rank searches the same list of layers, so all ranks find the same: modules themselves, the arguments of
LayerSpecs, and the closures of functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

# Levels of nesting that are searched: enough for a list of tuples of closures, too few to search a whole program.
_DEPTH = 6
_SHOWN = 4


@dataclass(frozen=True)
class SharedWeights:
    """`count` weights that the layers `layers` share, and the `names` of some of them."""

    layers: tuple[int, ...]
    names: tuple[str, ...]
    count: int

    def __str__(self) -> str:
        numbers = [str(layer) for layer in self.layers]
        more = f" and {self.count - len(self.names)} more" if self.count > len(self.names) else ""
        return f"layers {', '.join(numbers[:-1])} and {numbers[-1]} share {', '.join(self.names)}{more}"


def shared_weights(layers: Sequence[Any]) -> list[SharedWeights]:
    """The trained weights that layers of a PipelineModule share, except through TiedLayerSpecs of one key."""
    holders: dict[nn.Parameter, list[int]] = {}
    names: dict[nn.Parameter, str] = {}
    for number, layer in enumerate(layers):
        for name, parameter in _held(layer):
            if parameter.requires_grad:
                names.setdefault(parameter, name)
                numbers = holders.setdefault(parameter, [])
                if number not in numbers:
                    numbers.append(number)
    of_layers: dict[tuple[int, ...], list[str]] = {}
    for parameter, numbers in holders.items():
        if len({_owner(layers[number], number) for number in numbers}) > 1:
            of_layers.setdefault(tuple(numbers), []).append(names[parameter])
    return [SharedWeights(numbers, tuple(found[:_SHOWN]), len(found)) for numbers, found in of_layers.items()]


def warning_of(shared: Iterable[SharedWeights]) -> str:
    """The warning about all of them, in one line."""
    return (f"{'; '.join(map(str, shared))}, without a TiedLayerSpec: layers on one rank train one weight, layers on "
            "other ranks train copies that diverge, so losses depend on which layers are on one rank. Give layers that "
            "share a weight as TiedLayerSpec with one key")


def _owner(layer: Any, number: int) -> Any:
    """The owner of the layer's weights: the key, which is one for all layers that DeepSpeed ties, or the layer."""
    return layer.key if isinstance(layer, TiedLayerSpec) else number


def _held(value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a layer's `value` leads to, with names to show."""
    if isinstance(value, nn.Parameter):
        yield f"a Parameter {list(value.shape)}", value
    elif isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            yield f"{type(value).__name__}.{name}", parameter
    elif depth:
        for part in _parts(value):
            yield from _held(part, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, LayerSpec):
        return [*value.module_args, *value.module_kwargs.values(), getattr(value, "forward_fn", None)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return _closed_over(value)
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__dict__", {}).values()
    return ()


def _closed_over(function: FunctionType) -> list[Any]:
    """The values that a function refers to beyond its arguments; of globals only modules and parameters."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # It isn't set yet.
            pass
    of_script = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(),
            *(value for value in of_script if isinstance(value, (nn.Module, nn.Parameter)))]
