"""Weights that a script's own hooks step in the middle of a batch.

Gradient release saves the memory of gradients: a hook behind each accumulation (register_post_accumulate_grad_hook)
steps its weight and drops the gradient. With one micro-batch that is a step like any other. With several of them in
flight some forwards see the old weight and some the new one; which ones, the schedule decides, so that losses are those
of no other schedule.
"""

from __future__ import annotations

import torch
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor, nn

from ds_vshape.split_backward import any_of_script


class ReleasedWeights:
    """Finds weights of `module` that hooks of the script step; hooks are looked for once, before the first batch."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hooked: list[tuple[str, nn.Parameter]] | None = None
        self._before: list[Tensor] = []
        self._micro_batches = 0

    @property
    def has_hooks(self) -> bool:
        """Whether there are hooks of the script's own behind accumulations, which may step weights."""
        return bool(self._hooked)

    def start(self, micro_batches: int) -> None:
        """To be called when a training batch of `micro_batches` starts."""
        if self._hooked is None:
            self._hooked = [(name, parameter) for name, parameter in self._module.named_parameters()
                            if any_of_script((parameter._post_accumulate_grad_hooks or {}).values())]
        self._micro_batches = micro_batches
        self._before = self._sums() if micro_batches > 1 else []

    def check(self) -> None:
        """To be called when all passes of the batch are done; PipelineError if a weight has changed since its start."""
        if not self._hooked or not self._before:
            return
        for (name, _), before, after in zip(self._hooked, self._before, self._sums(), strict=True):
            if not torch.equal(before, after):
                raise PipelineError(f"a hook of the script's own changes the weight {name} in the middle of a batch of "
                                    f"{self._micro_batches} micro-batches, so that losses depend on the schedule: take "
                                    "gradient_accumulation_steps = 1, or step after the batch, or train without "
                                    "\"pipeline_schedule\" in the config")

    def _sums(self) -> list[Tensor]:
        return [parameter.detach().sum(dtype=torch.float64) for _, parameter in self._hooked or ()]
