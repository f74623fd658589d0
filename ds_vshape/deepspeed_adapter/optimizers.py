"""What DeepSpeed's optimizers keep, and what their steps and reductions consist of.

Checked with DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py, runtime/fp16). Each class
here is one view of one kind of optimizer:

    Bf16Sums        BF16_Optimizer              where gradients add up
    GradAccumSums   DeepSpeedZeroOptimizer      the same, with an accumulation dtype of its own
    Reduction       DeepSpeedZeroOptimizer      the sum of gradients over data parallel ranks, in parts
    ZeroStep        DeepSpeedZeroOptimizer      what a step reads and changes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, FP32_WEIGHT_KEY, SINGLE_PARTITION_OF_FP32_GROUPS
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.nn import Parameter

# Attributes of a parameter in which gradients add up.
GRADIENTS = ("grad", "grad_accum")
# What a step of DeepSpeedZeroOptimizer changes besides weights, their states and the loss scaler.
_OF_STEP = ("overflow", "_global_grad_norm", "micro_step_id", "_hp_optimizer_states_linked")


def core_of(optimizer: Any) -> Any:
    """The optimizer that one of DeepSpeed's has at its core, torch's or one like that; else `optimizer` itself."""
    return getattr(optimizer, "optimizer", optimizer)


def chain_of(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it is made around, the innermost last; nothing for None."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def is_bf16(optimizer: Any) -> bool:
    """Whether it is BF16_Optimizer itself, which the engine's step must know."""
    return type(optimizer) is BF16_Optimizer


# -- gradients


class Bf16Sums:
    """BF16_Optimizer's buffers of high precision. It zeroes `.grad` when a backward reaches a stage's outputs."""

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self._optimizer = optimizer
        self._places = {parameter: (group, index) for group, parameters in enumerate(optimizer.bf16_groups)
                        for index, parameter in enumerate(parameters)}

    @property
    def parameters(self) -> Iterable[Parameter]:
        """Those that the optimizer holds."""
        return self._places.keys()

    def holds(self, parameter: Parameter) -> bool:
        """Whether it is one of `parameters`."""
        return parameter in self._places

    def buffer(self, parameter: Any) -> Tensor:
        """The flat buffer of a parameter, which counts as its gradient from now on."""
        group, index = self._places[parameter]
        flat: Tensor = self._optimizer.fp32_groups_gradients[group][index]
        parameter._hp_grad = flat
        self._optimizer.fp32_groups_has_gradients[group][index] = True
        return flat

    def total(self, parameter: Parameter) -> Tensor | None:
        """The flat buffer of a parameter, if it counts as its gradient."""
        group, index = self._places[parameter]
        has_gradient = self._optimizer.fp32_groups_has_gradients[group][index]
        return self._optimizer.fp32_groups_gradients[group][index] if has_gradient else None


class GradAccumSums:
    """`parameter.grad_accum` of a dtype of its own, to which DeepSpeed moves what autograd accumulates in `.grad`."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self.dtype: torch.dtype = optimizer.gradient_accumulation_dtype
        self.parameters = set(held_by(optimizer) or ())

    def total(self, parameter: Any) -> Tensor | None:
        """The sum so far, in its own shape."""
        return parameter.grad_accum  # type: ignore[no-any-return]

    def start(self, parameter: Any, total: Tensor) -> None:
        """Set the sum."""
        parameter.grad_accum = total

    def take_in(self) -> None:
        """Move what is in `.grad` to the sums."""
        self._optimizer.fill_grad_accum_attribute()


def sums_of(optimizer: Any) -> Bf16Sums | GradAccumSums | None:
    """Where `optimizer` has gradients add up; None if that is in `.grad`."""
    if isinstance(optimizer, BF16_Optimizer):
        return Bf16Sums(optimizer)
    return GradAccumSums(optimizer) if getattr(optimizer, "use_grad_accum_attribute", False) else None


def held_by(optimizer: Any) -> Iterator[Parameter] | None:
    """The parameters that one of DeepSpeed's optimizers steps; None for an optimizer of torch's."""
    groups = getattr(optimizer, "bit16_groups", None)
    return None if groups is None else chain.from_iterable(groups)


def sums_in_memory(optimizer: Any) -> Sequence[Tensor] | None:
    """The flat gradients that BF16_Optimizer has from the start; None for others, which have them in a batch."""
    return optimizer.fp32_groups_gradients_flat if isinstance(optimizer, BF16_Optimizer) else None


# -- the reduction


class Reduction:
    """The sum of gradients over data parallel ranks that DeepSpeedZeroOptimizer.reduce_gradients consists of."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._groups = {parameter: group for group, parameters in enumerate(optimizer.bit16_groups)
                        for parameter in parameters}

    @property
    def parameters(self) -> Iterable[Parameter]:
        """Those that the optimizer holds."""
        return self._groups.keys()

    def prepare(self) -> None:
        """Make the buckets; before the first reduction of a batch."""
        self._optimizer.setup_buckets()

    def gradient(self, parameter: Parameter) -> Tensor | None:
        """What is reduced of a parameter."""
        return self._optimizer.get_gradient_for_reduction(parameter)  # type: ignore[no-any-return]

    def reduce(self, parameters: Iterable[Parameter]) -> None:
        """Reduce the gradients of `parameters`; collective over replicas, which reduce the same in the same order."""
        for parameter in parameters:
            self._optimizer.reduce_independent_p_g_buckets_and_remove_grads(parameter, self._groups[parameter])
        self._optimizer.reduce_ipg_grads()

    def finish(self) -> None:
        """To be called when all is reduced."""
        self._optimizer.set_gradient_accumulation_boundary(True)
        self._optimizer.overlapping_partition_gradients_reduce_epilogue()

    def forget(self) -> None:
        """Leave nothing of what was reduced."""
        optimizer = self._optimizer
        for number in range(len(optimizer.params_already_reduced)):
            optimizer.params_already_reduced[number] = False
        optimizer._release_ipg_buffers()
        optimizer.averaged_gradients.clear()


def reduction_of(optimizer: Any) -> Reduction | None:
    """Of an optimizer that reduces gradients in these parts; None for any other."""
    if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.partition_gradients:
        return None
    return Reduction(optimizer)


def make_buckets(optimizer: Any) -> None:
    """Make what gradients move into when they are reduced, where the first backward of a batch would make it."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.setup_buckets()


@dataclass(frozen=True)
class GradientCopies:
    """Bytes of what an optimizer has of gradients at the end of a batch: the `bucket` into which they move when they
    are reduced (0 for none), and `flat`, the largest group's copy that the step takes; `made` is the most that making
    that copy takes."""

    bucket: int = 0
    flat: int = 0
    made: int = 0


def gradient_copies(optimizer: Any) -> GradientCopies:
    """Of one of DeepSpeed's optimizers or torch's; nothing for one that steps by gradients where they are."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return GradientCopies()
    size = optimizer.gradient_accumulation_dtype.itemsize
    bucket = int(optimizer.reduce_bucket_size) * size if optimizer.contiguous_gradients else 0
    of_groups = []
    for weights in optimizer.single_partition_of_fp32_groups:
        # Flattened in the dtype of the sums, and cast to that of the weights.
        cast = weights.dtype.itemsize if weights.dtype.itemsize != size else 0
        of_groups.append((weights.nbytes, weights.numel() * (size + cast)))
    flat, made = max(of_groups, default=(0, 0))
    return GradientCopies(bucket, flat, made)


# -- the step


class ZeroStep:
    """The step of DeepSpeedZeroOptimizer, whose state is on the device."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer

    @property
    def core(self) -> Any:
        """torch's optimizer, with the states of `weights` and the parameter groups."""
        return self._optimizer.optimizer

    @property
    def weights(self) -> Sequence[Tensor]:
        """The master weights that it steps, one flat tensor a group."""
        return self._optimizer.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    @property
    def gradients(self) -> dict[Any, Any]:
        """The reduced gradients by group, which the step takes."""
        return self._optimizer.averaged_gradients  # type: ignore[no-any-return]

    @staticmethod
    def flat(gradients: Any) -> Tensor | None:
        """The one tensor that a group's gradients are, where they aren't put together before they're scaled."""
        flat: Tensor | None = getattr(gradients, "flat_partition", None)
        return flat if flat is not None else gradients[0] if gradients is not None and len(gradients) == 1 else None

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What else a step changes: numbers and flags of the optimizer, and of its loss scaler."""
        return ({name: getattr(self._optimizer, name) for name in _OF_STEP}, dict(vars(self._optimizer.loss_scaler)))

    def put_back(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Set what `state` has given."""
        vars(self._optimizer).update(state[0])
        vars(self._optimizer.loss_scaler).update(state[1])

    def update_module(self) -> None:
        """Make the module's weights from `weights`; collective over data parallel ranks."""
        self._optimizer.update_lp_params()

    @property
    def clip(self) -> float:
        """The norm to which gradients are clipped; 0 for none."""
        return self._optimizer.clip_grad  # type: ignore[no-any-return]

    @property
    def loss_scale(self) -> float:
        """That of the next step."""
        return self._optimizer.loss_scale  # type: ignore[no-any-return]

    @property
    def overflow(self) -> bool:
        """Whether the last step was left out since a gradient wasn't finite."""
        return bool(self._optimizer.overflow)

    @property
    def counts_norm(self) -> bool:
        """Whether it keeps the norm of gradients."""
        return bool(self._optimizer.compute_grad_norm)

    def set_grad_norm(self, norm: Any) -> None:
        """The norm of the last step."""
        self._optimizer._global_grad_norm = norm

    @contextmanager
    def without_pipeline(self, seen: Callable[[float], None]) -> Iterator[None]:
        """Around a step that exchanges only with other replicas; `seen` is told the norm of this rank's gradients,
        loss scale included.

        step() asks other pipeline ranks over model_parallel_group, which is None where there are none, and gets the
        norm from scaled_global_norm().
        """
        optimizer, scaler = self._optimizer, self._optimizer.loss_scaler
        group, optimizer.model_parallel_group = optimizer.model_parallel_group, None
        norm_of_all = optimizer.scaled_global_norm

        def read(*args: Any, **kwargs: Any) -> Any:
            # Here, where DeepSpeed waits for it as well: later the host would wait for the whole step.
            norm = norm_of_all(*args, **kwargs)
            seen(float(norm))
            return norm

        optimizer.scaled_global_norm = read
        raises = scaler.dynamic and scaler.raise_error_at_min_scale
        if raises:
            # That, too, is for all ranks to find out together.
            scaler.raise_error_at_min_scale = False
        try:
            yield
        finally:
            del optimizer.scaled_global_norm
            optimizer.model_parallel_group = group
            if raises:
                scaler.raise_error_at_min_scale = True


def zero_step_of(optimizer: Any) -> ZeroStep | None:
    """Of a DeepSpeedZeroOptimizer that isn't offloaded; None for any other."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return None
    return ZeroStep(optimizer)


# -- master weights and checkpoints


def mapping_of(parameter: Any) -> Any:
    """Where ZeRO and BF16_Optimizer keep a parameter's master weights (`get_hp_fragment`) and, by name, their state
    (`optim_fragment`); None for a parameter that has none on this rank."""
    return getattr(parameter, "_hp_mapping", None)


def set_mapping(parameter: Any, mapping: Any) -> None:
    """Set what `mapping_of` gives."""
    parameter._hp_mapping = mapping


def groups_with_master_weights(optimizer: Any) -> list[list[Parameter]]:
    """The parameters of which this rank has master weights, by group."""
    groups = getattr(optimizer, "bf16_groups", None) or getattr(optimizer, "bit16_groups", None) or []
    return [[parameter for parameter in group if mapping_of(parameter) is not None] for group in groups]


@dataclass(frozen=True)
class FlatGroup:
    """A parameter group as one flat tensor that replicas share: how many `numbers` its parameters have, and how many
    each replica's `part` has, with zeros at the end."""

    numbers: int
    part: int


def flat_groups(optimizer: Any, replicas: int) -> list[FlatGroup] | None:
    """The groups of an optimizer of which `replicas` have a part each; None where the order of parameters depends on
    the number of replicas, or not all groups have as many parts, as those of experts."""
    if isinstance(optimizer, BF16_Optimizer):
        groups, parts = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups, parts = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        if optimizer.round_robin_gradients or any(map(any, optimizer.round_robin_bit16_padding)):
            return None
    else:
        return None
    if any(count != replicas for count in optimizer.partition_count):
        return None
    return [FlatGroup(sum(parameter.numel() for parameter in group), part.numel())
            for group, part in zip(groups, parts, strict=True)]


def convert_without(optimizer: Any, names: Iterable[str]) -> None:
    """Make DeepSpeed's ds_to_universal.py skip the parameters `names` in the file that `optimizer` saves."""
    for group in getattr(optimizer, "_param_slice_mappings", ()):
        for name in names:
            group.pop(name, None)


def load_universal_by(parameter: Any, load: Callable[..., Any]) -> None:
    """Let `load` do what DeepSpeed does to load a parameter of a universal checkpoint: it takes a folder and two ranks
    and returns the step. Nothing is done where the optimizer can't load one."""
    if hasattr(parameter, "load_hp_checkpoint_state"):
        parameter.load_hp_checkpoint_state = load


# The name of a weight's file in a universal checkpoint; the others are parts of its state.
UNIVERSAL_WEIGHT: str = FP32_WEIGHT_KEY
# Parts of what an optimizer of flat groups saves: each group's master weights, and the state of torch's optimizer.
MASTER_WEIGHTS: str = SINGLE_PARTITION_OF_FP32_GROUPS
CORE_STATE: str = BASE_OPTIMIZER_STATE
