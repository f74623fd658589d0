"""DeepSpeed's PipelineModule; checked with DeepSpeed 0.19.8 (runtime/pipe/module.py)."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe import module as _stock
from torch import nn

# Under the name that is DeepSpeed's even where a script has ours in its place.
StockPipelineModule = _stock.PipelineModule


class StockModule(_stock.PipelineModule):  # type: ignore[misc]
    """DeepSpeed's module, with names for those of its private parts that our subclass uses.

    What it overrides keeps DeepSpeed's names (parts.py).
    """

    @property
    def layer_specs(self) -> list[Any]:
        """The layers of the whole model, as the script gives them."""
        return self._layer_specs  # type: ignore[no-any-return]

    @property
    def layer_count(self) -> int:
        """Of the whole model."""
        return self._num_layers  # type: ignore[no-any-return]

    def unmatched(self, method: str) -> list[str] | None:
        """For a partition method "type:..." that no layer matches, the names that it could match; None otherwise."""
        if not method.lower().startswith("type:"):
            return None
        try:
            self._find_layer_type(method.split(":")[1])
        except RuntimeError:  # It raises this if there is none.
            names = [type(layer).__name__ if isinstance(layer, nn.Module) else
                     getattr(getattr(layer, "typename", layer), "__name__", "") for layer in self._layer_specs]
            return list(filter(None, dict.fromkeys(names)))
        return None

    @property
    def job_topology(self) -> Any:
        """The ranks' places."""
        return self._topo

    @property
    def job_grid(self) -> Any:
        """The ranks' groups."""
        return self._grid

    @property
    def local_bounds(self) -> tuple[int, int]:
        """The layers that are built, or active, on this rank: the first, and the one after the last."""
        return self._local_start, self._num_layers if self._local_stop is None else self._local_stop

    def set_local_bounds(self, start: int, stop: int) -> None:
        """Say which layers are built next."""
        self._set_bounds(start, stop)

    def set_active(self, funcs: list[Any], checkpointable: list[bool], start: int, stop: int) -> None:
        """Let forward(), saving and loading see these layers."""
        # Past nn.Module.__setattr__: stages take turns at each pass, and it takes longer than all else here.
        self.__dict__.update(forward_funcs=funcs, is_checkpointable_results=checkpointable, _local_start=start,
                             _local_stop=stop)

    def precomputed_checkpointable(self) -> list[bool]:
        """Which segments of the active layers can be checkpointed, for the present interval."""
        # DeepSpeed keeps one rank's values for one interval.
        self.is_checkpointable_results_interval = None
        super()._precompute_checkpointable_values()
        return self.is_checkpointable_results  # type: ignore[no-any-return]

    def weight_named(self, module: nn.Module, name: str) -> Any:
        """A weight of a tied module, by its dotted name."""
        return self._recursive_getattr(module, name)

    def file_name_part(self) -> str:
        """What layer files have in their names for this rank's place among tensor parallel ranks."""
        return self._grid._topo.get_rank_repr(rank=self.global_rank)  # type: ignore[no-any-return]

    def _get_frozen_parameter_names(self, layer: nn.Module) -> list[str]:
        """What a checkpoint without frozen parameters leaves out of `layer`: also what a quantized one saves behind its
        own name, by which it is decoded."""
        frozen: list[str] = super()._get_frozen_parameter_names(layer)
        starts = tuple(f"{name}." for name in frozen)
        return [*frozen, *(name for name in layer.state_dict() if name.startswith(starts))]
