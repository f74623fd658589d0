"""A PipelineModule that builds as many chunks on a rank as the schedule's placement puts there.

DeepSpeed's module (runtime/pipe/module.py) builds one run of layers a rank. With the V placement a rank holds two
runs that don't touch, each with its own bounds, layer names and checkpoint files:

    layers    0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11 | 12 13 | 14 15
    stages     0     1     2     3     4      5       6       7
    ranks      0     1     2     3     3      2       1       0

One chunk at a time is active: it is what forward(), saving and loading see. The layers keep DeepSpeed's global names
and seeds, so weights and layer files don't depend on the placement.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from deepspeed.runtime.pipe import module as stock
from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.config import DsConfig, ScheduleConfig, find_section
from ds_vshape.schedule.named import placement_of
from ds_vshape.schedule.placement import Placement, linear
from ds_vshape.versions import check_versions


@dataclass
class Chunk:
    """One stage of this rank: its layers [start, stop) of the whole model, and their functions."""

    stage: int
    start: int
    stop: int
    funcs: list[Any] = field(default_factory=list)
    checkpointable: list[bool] = field(default_factory=list)


class PipelineModule(stock.PipelineModule):  # type: ignore[misc]
    """DeepSpeed's PipelineModule, placed as the "pipeline_schedule" of the config demands.

    Args:
        layers, num_stages, and all others: as in deepspeed.pipe.PipelineModule; `num_stages` counts pipeline ranks.
            Partition methods work over stages, of which the V and the interleaved placement have two a rank.
        config: the ds_config (dictionary, path or base64 text). Without it the environment variable DS_VSHAPE_CONFIG
            or the command line's --deepspeed_config names it. Without any, or without the key in it, this is
            DeepSpeed's own module.

    Raises:
        ConfigError: for a "pipeline_schedule" that can't be used.
        PipelineError: for fewer layers than stages.
    """

    tied_comms: dict[str, Any]

    def __init__(self, layers: Iterable[Any], num_stages: int | None = None, *args: Any, config: DsConfig | None = None,
                 **kwargs: Any) -> None:
        check_versions()
        self.schedule_config: ScheduleConfig | None = find_section(config, sys.argv)
        self.placement: Placement
        self.chunks: list[Chunk] = []
        super().__init__(layers, num_stages, *args, **kwargs)
        # DeepSpeed counts a tied module's gradients over a group of ranks; one rank alone has nothing to add up.
        self.tied_comms = {key: comm for key, comm in self.tied_comms.items() if len(comm["ranks"]) > 1}

    def _partition_layers(self, method: str = "uniform") -> None:
        ranks = self._topo.get_dim("pipe")
        self.placement = placement_of(self.schedule_config.name, ranks) if self.schedule_config else linear(ranks)
        self.num_stages = self.placement.stages
        if self._num_layers < self.num_stages:
            raise PipelineError(f"{self._num_layers} layers can't fill {self.num_stages} stages: {self._schedule_name} "
                                f"on {ranks} pipeline ranks needs at least {self.num_stages} layers")
        super()._partition_layers(method)
        # Some of DeepSpeed's methods give NumPy's integers, which its own seeding then refuses.
        self.parts: list[int] = [int(bound) for bound in self.parts]
        self.chunks = [Chunk(stage, self.parts[stage], self.parts[stage + 1])
                       for stage in self.placement.chunks[self.stage_id]]

    @property
    def _schedule_name(self) -> str:
        return self.schedule_config.name if self.schedule_config else "1f1b"

    def _build(self) -> None:
        for chunk in self.chunks:
            self._set_bounds(chunk.start, chunk.stop)
            self.forward_funcs = chunk.funcs
            super()._build()
        self._activate(self.chunks[0])

    def activate_stage(self, stage: int) -> None:
        """Let forward() run `stage`, which this rank must hold."""
        self._activate(self.chunks[self.placement.chunks[self.stage_id].index(stage)])

    def _activate(self, chunk: Chunk) -> None:
        self.forward_funcs = chunk.funcs
        self.is_checkpointable_results = chunk.checkpointable
        self._local_start, self._local_stop = chunk.start, chunk.stop

    def stage_owner(self, layer_idx: int) -> int:
        """The pipeline rank that holds layer `layer_idx`."""
        return self.placement.rank_of(super().stage_owner(layer_idx))

    def _precompute_checkpointable_values(self) -> None:
        for chunk in self.chunks:
            self._activate(chunk)
            # The stock method keeps one rank's values for one interval; each chunk needs its own.
            self.is_checkpointable_results_interval = None
            super()._precompute_checkpointable_values()
            chunk.checkpointable = self.is_checkpointable_results
        self._activate(self.chunks[0])

    def save_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for chunk in self.chunks:
            self._activate(chunk)
            super().save_state_dict(*args, **kwargs)

    def load_state_dir(self, *args: Any, **kwargs: Any) -> None:
        for chunk in self.chunks:
            self._activate(chunk)
            super().load_state_dir(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for chunk in self.chunks:
            self._activate(chunk)
            super().compile(*args, **kwargs)
