"""A PipelineModule that builds as many chunks on a rank as the schedule's placement puts there.

DeepSpeed's module (runtime/pipe/module.py) builds one run of layers a rank. With the V placement a rank holds two
runs that don't touch, each with its own bounds, layer names and checkpoint files:

    layers    0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11 | 12 13 | 14 15
    stages     0     1     2     3     4      5       6       7
    ranks      0     1     2     3     3      2       1       0

One chunk at a time is active: it is what forward(), saving and loading see. The layers keep DeepSpeed's global names
and seeds, so weights and layer files don't depend on the placement.

Scripts subclass the module and override DeepSpeed's hooks, `_partition_layers` among them, which know one stage a rank.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from deepspeed.utils import logger
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ds_vshape.config.arguments import bound, check_arguments, check_method
from ds_vshape.config.batch_size import micro_batches_of
from ds_vshape.config.compatibility import check_accepted
from ds_vshape.config.folders import check_folder
from ds_vshape.config.section import (KEY, TIMEOUT_SECONDS, ConfigError, DsConfig, LayerCosts, Partition,
                                      ScheduleConfig, find_ds_config, find_section, read_section)
from ds_vshape.config.to_schedule import KnownStages, partition_problem
from ds_vshape.deepspeed_adapter.module import StockModule
from ds_vshape.deepspeed_adapter.parts import check_parts
from ds_vshape.deepspeed_adapter.utils import set_random_seed
from ds_vshape.deepspeed_adapter.versions import check_versions
from ds_vshape.health.preflight import Facts, Preflight, config_facts, module_facts, versions
from ds_vshape.health.watch import groups_without_limit, watch_job
from ds_vshape.module.fast_setattr import FastSetattr
from ds_vshape.module.layer_times import LayerProfiler, LayerTimes, precision
from ds_vshape.module.loss_fn import load_loss_fn, loss_fn_path, save_loss_fn
from ds_vshape.module.partition_planning import agree_on_stages
from ds_vshape.module.segment import Checkpoint, Segment, parameters_of
from ds_vshape.module.shared_weights import shared_weights, warning_of
from ds_vshape.module.tied import Tie, check_has, check_one_module, check_shapes, find_ties, shapes_of
from ds_vshape.runtime.token_mean import ITEMS, averages_tokens
from ds_vshape.schedule.partition.balance import PartitionError, balance, check_bounds, check_costs, rank_loads
from ds_vshape.schedule.partition.layers import Layers
from ds_vshape.schedule.placement import Placement, linear

# The relative difference that two measurements of one layer may have.
_NOISE = 0.02
# For how many micro-batches a rank the partition is planned where the config doesn't say.
_MICRO_BATCHES_A_RANK = 4
_PARTITION: TypeAdapter[Partition] = TypeAdapter(Partition)

# Called before a module with a schedule is built. plugin.py registers here, because it imports this module.
before_building: list[Callable[[], None]] = []


@dataclass
class Chunk:
    """One stage of this rank: its layers [start, stop) of the whole model, and their functions."""

    stage: int
    start: int
    stop: int
    funcs: list[Any] = field(default_factory=list)
    checkpointable: list[bool] = field(default_factory=list)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of its layers; one that layers share may come more than once."""
        return parameters_of(self.funcs)


class PipelineModule(FastSetattr, StockModule):
    """DeepSpeed's PipelineModule, with its layers placed as the "pipeline_schedule" of the config requires.

    Without a config, or without the key in it, this is DeepSpeed's own module.

    Args:
        layers, num_stages, and all others: as in deepspeed.pipe.PipelineModule. `num_stages` counts pipeline ranks;
            DeepSpeed's partition methods divide the layers into stages, and some schedules have two stages on each
            rank.
        partition_method: one of DeepSpeed's methods, or a value that balances the work of ranks instead of stages:
            bounds like [0, 3, 5, 8, 10] (the first layer of each stage, and the number of layers);
            {"costs": [...]} with the cost of each layer, a number or its (F, B, W); or "profile", which times each
            layer's passes on rank 0. The schedule "adaptive" plans the last two together with the order of passes, for
            the fastest batch within its memory limit. The config's "partition" overrides it.
        example: for "profile", a micro-batch as train_batch's iterator returns it, (inputs, labels); only rank 0 needs
            it.
        config: the ds_config, as a dictionary, a path or base64 text. By default it is read from the file that the
            environment variable DS_VSHAPE_CONFIG names, else from the file after --deepspeed_config on the command
            line.
        loss_average: "tokens" for the mean over the tokens of all micro-batches and replicas, for which `loss_fn` takes
            (outputs, labels, num_items_in_batch) and gives the sum over its micro-batch's tokens, divided by
            `num_items_in_batch`, or (this, auxiliary loss) with a loss that is averaged over micro-batches. Tokens are
            the labels other than -100, or what `loss_fn.count_tokens(labels)` says. "micro_batches" for the mean of
            the micro-batches' losses, as in DeepSpeed. By default "tokens" if `loss_fn` takes `num_items_in_batch`. The
            config's "loss_average" overrides it.

    Raises:
        ConfigError: for an illegal "pipeline_schedule", and for a `loss_average` that `loss_fn` can't follow.
        PipelineError: for fewer layers than stages, for arguments from which the job's ranks can't build a module
            (ds_vshape/config/arguments.py), and for tied layers that differ (ds_vshape/module/tied.py).
        PreflightError: on every rank, if ranks differ in their versions, config or arguments, or if some of them can't
            build their layers.
        PartitionError: on every rank, for a partition that doesn't fit the layers, for a memory limit that no partition
            keeps to, and for a profile that can't be measured.
    """

    num_stages: int
    tied_comms: dict[str, Any]
    _ties: dict[str, Tie]
    _tied_sources: dict[str, int]

    def __init__(self, layers: Iterable[Any], num_stages: int | None = None, *args: Any, config: DsConfig | None = None,
                 example: Any = None, loss_average: str | None = None, **kwargs: Any) -> None:
        self.schedule_config: ScheduleConfig | None
        self.chunks: list[Chunk] = []
        self._at_layers: tuple[Callable[[int], None], ...] = ()
        # The measured times of the layers, with the partition "profile".
        self.layer_times: LayerTimes | None = None
        # What the partition was planned by, where it was planned together with the order.
        self.known_stages: KnownStages | None = None
        # Whether a batch's loss is the mean over tokens.
        self.averages_tokens = False

        if isinstance(layers, Iterable) and not isinstance(layers, (Sequence, nn.Module)):
            layers = list(layers)

        def read() -> Facts:
            check_versions()
            check_parts()
            ds_config = find_ds_config(config, sys.argv) or {}
            arguments = bound(layers, num_stages, *args, **kwargs)
            self.schedule_config = read_section(ds_config)
            if self.schedule_config is not None:
                check_accepted(ds_config)
                check_arguments(arguments, dist.get_world_size())
                self._micro_batches = micro_batches_of(ds_config, _topology(arguments).get_dim("data"))
                self.averages_tokens = averages_tokens(self.schedule_config.loss_average, loss_average,
                                                       arguments.get("loss_fn"))
                # Traces are written by the first pipeline rank of the first pipeline.
                if self.schedule_config.trace is not None and dist.get_rank() == 0:
                    check_folder(f"{KEY}.trace.path", self.schedule_config.trace.path)
            elif loss_average is not None:
                raise ConfigError(f"loss_average = {loss_average!r}: must be None without {KEY!r} in the config; "
                                  "DeepSpeed's own engine averages the losses of micro-batches")
            self._precision = precision(ds_config)
            return {**versions(), **config_facts(ds_config, self.schedule_config), **module_facts(arguments),
                    "mean over tokens": self.averages_tokens}

        watch = watch_job(_timeout(config))
        with watch.phase(lambda: "PipelineModule"), groups_without_limit():
            self.preflight = Preflight(watch)
            self.preflight.compare(read)
            if self.schedule_config is not None:
                for prepare in before_building:
                    prepare()
                watch.place(_topology(bound(layers, num_stages, *args, **kwargs)))
            self._example = example
            super().__init__(layers, num_stages, *args, **kwargs)
            self._example = None
        if self.schedule_config is None:
            watch.close()

    @cached_property
    def placement(self) -> Placement:
        """Which stages are on which pipeline rank."""
        ranks = self.job_topology.get_dim("pipe")
        return self.schedule_config.placement_on(ranks) if self.schedule_config else linear(ranks)

    def _partition_layers(self, method: Any = "uniform") -> None:
        if self.schedule_config is None:
            self._divide(read_partition(method))
            return
        stages, ranks = self.placement.stages, self.placement.ranks
        if self.layer_count < stages:
            raise PipelineError(f"{self.layer_count} layers can't fill {stages} stages: {self.schedule_config.name} on "
                                f"{ranks} pipeline ranks needs at least {stages} layers")
        of_config = self.schedule_config.partition
        partition = read_partition(method) if of_config is None else of_config
        with _named("partition_method" if of_config is None else f"{KEY}.partition"):
            if isinstance(partition, str):
                check_method(partition)
            self._divide(partition)

    def _divide(self, partition: Partition) -> None:
        """Set the stages' bounds by `partition`."""
        if isinstance(partition, str) and partition.lower() != "profile":
            # DeepSpeed's methods divide the layers into `num_stages` parts.
            if (classes := self.unmatched(partition)) is not None:
                raise PartitionError(f"the partition's method {partition!r} matches no layer: must match one of "
                                     f"{', '.join(classes)}")
            ranks, self.num_stages = self.num_stages, self.placement.stages
            super()._partition_layers(partition)
            self.num_stages = ranks
            # Some of them return NumPy's integers, which DeepSpeed's own seeding refuses.
            self.parts: list[int] = [int(bound) for bound in self.parts]
        else:
            self.parts = list(self._bounds(partition))
            self._announce_partition()
        self.set_local_bounds(*self.parts[self.stage_id:self.stage_id + 2])

    def _adopt_partition(self) -> None:
        """Use the bounds that a subclass's `_partition_layers` has set; collective.

        Raises PartitionError if they can't be the bounds of the placement's stages.
        """
        assert self.schedule_config is not None
        if type(self)._partition_layers is _PARTITION_LAYERS:
            return
        stages, name = self.placement.stages, f"{type(self).__name__}._partition_layers"
        if self.schedule_config.partition is not None:
            with _named(f"{KEY}.partition"):
                self._divide(self.schedule_config.partition)
        elif stages == self.placement.ranks:
            # In DeepSpeed a rank builds the layers of its local bounds, even if `parts` differs.
            self.parts = self._chain_of_local_bounds(name)
        elif len(getattr(self, "parts", ())) != stages + 1:
            raise PartitionError(
                f"{name} divides the layers into one run for each pipeline rank, but {self.schedule_config.name} has "
                f"{stages} stages on {self.placement.ranks} ranks: give their bounds in the config, as \"partition\": "
                f"[0, ..., {self.layer_count}] with {stages + 1} numbers in the section \"{KEY}\"")
        self.parts = list(check_bounds(tuple(map(int, self.parts)), stages, self.layer_count))

    def _chain_of_local_bounds(self, name: str) -> list[int]:
        """The stages' bounds, from the local bounds of all ranks; collective."""
        start, stop = self.local_bounds
        own = {"stage": self.stage_id, "bounds": [int(start), int(stop)]}
        of_stages: dict[int, list[int]] = {}
        for fact in self.preflight.gather(own):
            if of_stages.setdefault(fact["stage"], fact["bounds"]) != fact["bounds"]:
                raise PartitionError(f"{name}: ranks of stage {fact['stage']} have the layers "
                                     f"{of_stages[fact['stage']]} and {fact['bounds']}")
        bounds = [of_stages[stage] for stage in sorted(of_stages)]
        if any(before[1] != after[0] for before, after in pairwise(bounds)):
            raise PartitionError(f"{name}: the stages' layers {bounds} leave a gap or overlap")
        return [bounds[0][0], *(stop for _, stop in bounds)]

    def _bounds(self, partition: Partition) -> Sequence[int]:
        """The stages' bounds by a method that DeepSpeed doesn't have."""
        if isinstance(partition, tuple):
            return check_bounds(partition, self.placement.stages, self.layer_count)
        if isinstance(partition, LayerCosts):
            costs, layers, noise = check_costs(partition.costs, self.layer_count), _layers_of(partition), 0.0
        else:
            self.layer_times = times = self._measure_layers()
            costs, noise = times.costs, _NOISE
            layers = Layers(times.forward, times.input_grad, times.weight_grad, times.after_forward,
                            times.after_backward)
        bounds = self._planned_bounds(layers, noise)
        if bounds is None:
            bounds = balance(costs, self.placement, noise)
        if self.global_rank == 0:
            shares = ", ".join(f"{load / math.fsum(costs):.1%}" for load in rank_loads(costs, bounds, self.placement))
            logger.info(f"partition: shares of the work on pipeline ranks 0 to {self.placement.ranks - 1}: {shares}")
        return bounds

    def _planned_bounds(self, layers: Layers, noise: float) -> Sequence[int] | None:
        """Bounds that are planned together with the order of passes; None for schedules whose order isn't planned."""
        if self.schedule_config is None:
            return None
        ranks = self.placement.ranks
        problem = partition_problem(self.schedule_config, layers, ranks,
                                    self._micro_batches or _MICRO_BATCHES_A_RANK * ranks, noise)
        if problem is None:
            return None
        self.known_stages = agree_on_stages(problem, self.schedule_config, self.global_rank == 0,
                                            self.preflight.exchange)
        return self.known_stages.bounds

    def _measure_layers(self) -> LayerTimes:
        where = self.job_topology.get_coord(self.global_rank)
        # Tensor parallel layers communicate, so all ranks that share them run them.
        measures = where.pipe == 0 and where.data == 0
        device = get_accelerator().device_name(self.local_rank)
        loss_fn = partial(self.loss_fn, **{ITEMS: 1}) if self.averages_tokens else self.loss_fn
        return LayerProfiler(self.layer_specs, self._example, loss_fn, self._seed_layer, device,
                             self._precision).agree(measures, self.preflight.exchange)

    def _seed_layer(self, layer: int) -> None:
        if self.seed_layers:
            (self.seed_fn or set_random_seed)(self.base_seed + layer)

    def _enter_layer(self, forwards: int, layer: int) -> None:
        """Seed `layer` as DeepSpeed does, in the module's forward number `forwards`."""
        self.curr_layer = layer
        self.layer_starts(layer)
        if self.seed_layers:
            (self.seed_fn or set_random_seed)(self.base_seed * (forwards + 1) + layer)

    def _announce_partition(self) -> None:
        if self.global_rank == 0:
            for stage, (start, stop) in enumerate(pairwise(self.parts)):
                logger.info(f"partition: stage {stage} on pipeline rank {self.placement.rank_of(stage)} has layers "
                            f"{start} to {stop - 1}")

    def _build(self) -> None:
        if self.schedule_config is None:
            super()._build()
            self.chunks = [Chunk(self.stage_id, *self.local_bounds, self.forward_funcs)]
            return
        self._adopt_partition()
        shared = shared_weights(self.layer_specs)
        if shared and self.placement.ranks > 1:
            logger.warning(warning_of(shared))
        # If a layer can't be built on one rank, all ranks raise the error.
        self.preflight.compare(self._build_chunks)

    def _build_chunks(self) -> Facts:
        self.chunks = [Chunk(stage, self.parts[stage], self.parts[stage + 1])
                       for stage in self.placement.chunks[self.stage_id]]
        for chunk in self.chunks:
            self.set_local_bounds(chunk.start, chunk.stop)
            self.forward_funcs = chunk.funcs
            super()._build()
        self._activate(self.chunks[0])
        parameter: Any
        for parameter in self.idle_weights().values():
            parameter.ds_pipe_replicated = True
        for key, tie in find_ties(self.layer_specs).items():
            check_one_module(key, [(layer, self.layer_specs[layer]) for layer in tie.layers
                                   if self.stage_owner(layer) == self.stage_id])
        for key, names in self.tied_weight_attrs.items():
            check_has(self.tied_modules[key], key, names)
        return {"bounds of the stages": self.parts}

    def record(self, recording: AbstractContextManager[Any]) -> None:
        """Let the next forward(), and no other, run its layers inside `recording`."""
        self.__dict__["_recording"] = recording

    def forward(self, forward_input: Any) -> Any:
        """The outputs of the active chunk for the inputs (a tensor or a tuple) of its first layer.

        Segments of `activation_checkpoint_interval` layers are checkpointed, under the same conditions as in DeepSpeed.
        """
        if self.schedule_config is None:
            return super().forward(forward_input)
        self.micro_offset += 1
        active = Chunk(self.stage_id, *self.local_bounds, self.forward_funcs, self.is_checkpointable_results)
        with self.__dict__.pop("_recording", None) or nullcontext():
            outputs = self.run_layers(active, forward_input, partial(self._enter_layer, self.micro_offset),
                                      self.activation_checkpoint_func)
        self.layer_starts(self.local_bounds[1])
        return outputs

    def run_layers(self, chunk: Chunk, inputs: Any, before_layer: Callable[[int], None], checkpoint: Checkpoint) -> Any:
        """The outputs of a chunk's layers; `before_layer` gets the number of each in the model before it runs, and
        `checkpoint` runs those that are recomputed."""
        interval = self.activation_checkpoint_interval
        if not interval:
            return Segment(chunk.funcs, chunk.start, before_layer).run(inputs)
        for start, again in zip(range(0, len(chunk.funcs), interval), chunk.checkpointable, strict=True):
            segment = Segment(chunk.funcs[start:start + interval], chunk.start + start, before_layer)
            inputs = segment.run_checkpointed(checkpoint, inputs) if again else segment.run(inputs)
        return inputs

    def layer_starts(self, layer: int) -> None:
        """Tell those who asked by `at_layers` that a forward comes to `layer`."""
        for starts in self._at_layers:
            starts(layer)

    @contextmanager
    def at_layers(self, starts: Callable[[int], None]) -> Iterator[None]:
        """Call `starts` with the number of each layer that forward() comes to inside, and at its end with that of the
        layer after them."""
        before = self._at_layers
        self._at_layers = (*before, starts)
        try:
            yield
        finally:
            self._at_layers = before

    def chunk_of(self, stage: int) -> Chunk:
        """The chunk that is `stage`, which this rank must hold."""
        return self.chunks[self.placement.chunks[self.stage_id].index(stage)]

    def activate_stage(self, stage: int) -> None:
        """Let forward() run `stage`, which this rank must hold."""
        self._activate(self.chunk_of(stage))

    def activate_layers(self, stage: int, layers: int) -> None:
        """Let forward() run the first `layers` of `stage` alone, which aren't checkpointed."""
        chunk = self.chunk_of(stage)
        self.set_active(chunk.funcs[:layers], [], chunk.start, chunk.start + layers)

    def _activate(self, chunk: Chunk) -> None:
        self.set_active(chunk.funcs, chunk.checkpointable, chunk.start, chunk.stop)

    def stage_owner(self, layer_idx: int) -> int:
        """The pipeline rank that holds layer `layer_idx`."""
        if self.schedule_config is None:
            return super().stage_owner(layer_idx)  # type: ignore[no-any-return]
        assert 0 <= layer_idx < self.layer_count
        return self.placement.rank_of(bisect_right(self.parts, layer_idx) - 1)

    def tied_ranks(self) -> list[set[int]]:
        """The pipeline ranks that share a weight, for each of the tied keys."""
        return [{self.stage_owner(layer) for layer in tie.layers} for tie in self._ties.values()]

    def _index_tied_modules(self) -> dict[str, Any]:
        self._ties = find_ties(self.layer_specs) if self.schedule_config else {}
        if self.schedule_config is None:
            return super()._index_tied_modules()  # type: ignore[no-any-return]
        if self._ties:
            check_shapes(self.preflight.gather(shapes_of(self.tied_modules, self.tied_weight_attrs)))
        # The layers whose ranks send the weights to the others.
        self._tied_sources = {key: tie.first for key, tie in self._ties.items()}
        # DeepSpeed sums a tied module's gradients over a group of ranks; a single rank needs no sum.
        comms = {key: comm for key, comm in super()._index_tied_modules().items() if len(comm["ranks"]) > 1}
        for key, tie in self._ties.items():
            if key in self.tied_modules and len(tie.layers) > 1:
                self._keep_apart(key, tie)
        return comms

    def _keep_apart(self, key: str, tie: Tie) -> None:
        """A tied module's parameters that aren't tied are each rank's own, and count in the gradients' norm."""
        module = self.tied_modules[key]
        tied = [self.weight_named(module, name) for name in self.tied_weight_attrs[key]]
        apart = {name: parameter for name, parameter in module.named_parameters()
                 if parameter.requires_grad and not any(parameter is weight for weight in tied)}
        for parameter in apart.values():
            parameter.ds_pipe_replicated = False
        if apart and self.stage_owner(tie.first) == self.stage_id and self.job_grid.data_parallel_id == 0:
            logger.info(f"tied layers {key!r} ({', '.join(map(str, tie.layers))}): tied_weight_attr doesn't name "
                        f"{', '.join(apart)}, which layers on one rank share and others don't")

    def _synchronize_tied_weights(self) -> None:
        if not self._ties:
            super()._synchronize_tied_weights()
            return
        for key, comm in self.tied_comms.items():
            ranks = sorted({self.stage_owner(layer) for layer in self._ties[key].layers})
            source = comm["ranks"][ranks.index(self.stage_owner(self._tied_sources[key]))]
            for name in comm["weight_attr"]:
                dist.broadcast(self.weight_named(comm["module"], name), src=source, group=comm["group"])

    def _activate_files(self, chunk: Chunk) -> None:
        """Let `chunk` be saved and loaded: DeepSpeed has a file for each of the active layers that is a module."""
        self._activate(chunk)
        self.forward_funcs = list(chunk.funcs)
        for key, tie in self._ties.items():
            if chunk.start <= tie.filed < chunk.stop:
                self.forward_funcs[tie.filed - chunk.start] = self.tied_modules[key]

    def _precompute_checkpointable_values(self) -> None:
        for chunk in self.chunks:
            self._activate(chunk)
            chunk.checkpointable = self.precomputed_checkpointable()
        self._activate(self.chunks[0])

    @property
    def _computes_loss(self) -> bool:
        """Whether this rank holds the last stage."""
        return self.placement.last_stage in self.placement.chunks[self.stage_id]

    def idle_weights(self) -> dict[str, nn.Parameter]:
        """By name, the weights of which this rank has a copy that it never trains: those of a loss function that is a
        module, if another rank computes the loss."""
        if not self.schedule_config or self._computes_loss or not isinstance(self.loss_fn, nn.Module):
            return {}
        used = {parameter for chunk in self.chunks for parameter in chunk.parameters()}
        return {f"loss_fn.{name}": parameter for name, parameter in self.loss_fn.named_parameters()
                if parameter not in used}

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        for chunk in self.chunks:
            self._activate_files(chunk)
            super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        self._activate(self.chunks[0])
        if self.schedule_config and self._computes_loss and self.job_grid.data_parallel_id == 0:
            save_loss_fn(self.loss_fn, self._loss_fn_path(save_dir), checkpoint_engine, exclude_frozen_params)

    def _loss_fn_path(self, folder: str) -> str:
        return loss_fn_path(folder, self.file_name_part())

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any, strict: bool = True) -> None:
        """As DeepSpeed's. Raises PipelineError if DeepSpeed has saved no file of a tied module (see tied.py)."""
        self._tied_sources = {key: tie.filed for key, tie in self._ties.items()}
        for chunk in self.chunks:
            self._activate_files(chunk)
            for key, tie in self._ties.items():
                number = tie.filed - chunk.start
                here = tie.plain is None and 0 <= number < len(chunk.funcs)
                if here and not self.ckpt_layer_path_list(load_dir, number):
                    raise PipelineError(f"{load_dir} has no weights of the tied layers {key!r} (layer {tie.filed}): "
                                        "DeepSpeed saves none if all of them have a forward_fn")
            super().load_state_dir(load_dir, checkpoint_engine, strict)
        self._activate(self.chunks[0])
        if self.schedule_config and self._computes_loss:
            load_loss_fn(self.loss_fn, self._loss_fn_path(load_dir), checkpoint_engine, strict)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for chunk in self.chunks:
            self._activate(chunk)
            super().compile(*args, **kwargs)


# Our override of DeepSpeed's hook, by which a script's own is recognized.
_PARTITION_LAYERS = PipelineModule._partition_layers


def _timeout(config: DsConfig | None) -> float:
    """The config's timeout_seconds; the default if the config can't be read, which the preflight reports."""
    try:
        section = find_section(config, sys.argv)
    except Exception:
        section = None
    return TIMEOUT_SECONDS if section is None else section.timeout_seconds


def _topology(arguments: Mapping[str, Any]) -> Any:
    """The topology of a PipelineModule with these arguments, which have been checked."""
    stages = arguments.get("num_stages") or 1
    return arguments.get("topology") or PipeDataParallelTopology(num_pp=stages, num_dp=dist.get_world_size() // stages)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Let errors of a partition name the key or the argument that it's from."""
    try:
        yield
    except PartitionError as error:
        raise PartitionError(f"{key}: {error}") from error


def _layers_of(partition: LayerCosts) -> Layers:
    """The layers whose costs were given; where a cost is a number, F, B and W take a third each."""
    passes = [cost if isinstance(cost, tuple) else (cost / 3,) * 3 for cost in partition.costs]
    return Layers.alike_in_memory(*zip(*passes))


def read_partition(method: Any) -> Partition:
    """PipelineModule's `partition_method`, checked as the config's "partition". Raises PartitionError."""
    try:
        return _PARTITION.validate_python(method)
    except ValidationError as error:
        raise PartitionError(f"partition_method = {method!r}: {error.errors()[0]['msg']}") from None
