"""The sum of gradients over data parallel ranks, started for each stage as soon as its last weight gradient is there.

DeepSpeed's own reduction (reduce_gradients of DeepSpeedZeroOptimizer, runtime/zero/stage_1_and_2.py) starts after all
passes, and the links are idle until then. Here its steps run for one stage after another, concurrently with the
remaining passes.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch.nn import Parameter

from ds_vshape.comm.background import Background, Handle
from ds_vshape.deepspeed_adapter.optimizers import Reduction, reduction_of
from ds_vshape.runtime.rank import Rank
from ds_vshape.split_backward import GradientAccumulator


class EarlyReduction:
    """Reduces the gradients that the optimizer of `reduction` holds for the stages of this rank.

    Every replica must reduce the same parameters in the same order, even if it has failed in the batch. So a stage is
    reduced early only after one batch has shown which of its parameters get gradients; all other parameters, and those
    of several stages, are reduced at the end.
    """

    def __init__(self, module: Any, reduction: Reduction, background: Background,
                 accumulator: GradientAccumulator) -> None:
        self._reduction, self._background, self._accumulator = reduction, background, accumulator
        self._of_stage = {chunk.stage: dict.fromkeys(chunk.parameters()) for chunk in module.chunks}
        uses = Counter(chain.from_iterable(self._of_stage.values()))
        tied = {weight for weight, _ in module.get_tied_weights_and_groups()}
        self._late = tied | {parameter for parameter, stages in uses.items() if stages > 1}
        self._with_gradients: set[Parameter] | None = None
        self._started: list[Handle[None]] = []
        self._reduced: set[Parameter] = set()

    def start(self, stage: int) -> None:
        """Start the reduction of `stage`, whose gradients are complete; every replica does so at the same place."""
        if self._with_gradients is None:
            return
        parameters = [parameter for parameter in self._of_stage[stage]
                      if parameter in self._with_gradients and parameter not in self._late]
        if not parameters:
            return
        self._reduction.prepare()
        gradients = [self._gradient(parameter) for parameter in parameters]
        self._reduced.update(parameters)
        self._started.append(self._background.start(lambda: self._reduction.reduce(parameters), gradients))

    def finish(self) -> bool:
        """Reduce what is left, if any stage was reduced early; if not, all is left to DeepSpeed (False)."""
        left = [parameter for parameter in self._reduction.parameters
                if self._reduction.gradient(parameter) is not None]
        early = bool(self._started)
        if self._with_gradients is None:
            self._with_gradients = set(left)
        self._await_started()
        if early:
            self._reduction.reduce([parameter for parameter in left if parameter not in self._reduced])
            self._reduction.finish()
        self._reduced.clear()
        return early

    def forget(self) -> None:
        """The batch doesn't count: wait for what was started, and leave nothing of it."""
        self._await_started()
        self._reduced.clear()
        self._reduction.forget()

    def _gradient(self, parameter: Parameter) -> torch.Tensor:
        """The gradient; of a batch that has failed here, or doesn't use the parameter, zeros."""
        if self._reduction.gradient(parameter) is None:
            self._accumulator.add(parameter, torch.zeros_like(parameter, requires_grad=False))
        gradient = self._reduction.gradient(parameter)
        assert gradient is not None
        return gradient

    def _await_started(self) -> None:
        handles, self._started = self._started, []
        for handle in handles:
            handle.result()


def reduction_for(rank: Rank, background: Background, accumulator: GradientAccumulator) -> EarlyReduction | None:
    """For `rank`, if its optimizer is one that this knows, and there are replicas; else all is left to DeepSpeed."""
    reduction = reduction_of(rank.optimizer)
    if reduction is None or rank.dp_world_size == 1:
        return None
    return EarlyReduction(rank.module, reduction, background, accumulator)
