"""Layers that share weights, wherever they stand.

DeepSpeed (runtime/pipe/module.py and engine.py) takes the lowest rank that has such a layer for the owner of its
weights, which is right while ranks follow the layers. Around a V a later layer may stand on a lower rank:

    weights at the start    are those of the first layer, as in the model on one rank, whatever its rank
    weights from a file     are those of the layer that has a file: one with a function of its own has none, unless all
                            have one; then the first layer gets the file (DeepSpeed would save none)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.pipe import TiedLayerSpec


@dataclass(frozen=True)
class Tie:
    """The layers of one key."""

    layers: tuple[int, ...]
    # The first that is the module itself, of which DeepSpeed writes a file.
    plain: int | None

    @property
    def first(self) -> int:
        """The layer with whose seed the weights are made."""
        return self.layers[0]

    @property
    def filed(self) -> int:
        """The layer whose file has the weights."""
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
