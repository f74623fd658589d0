"""The data of a batch, all drawn when it starts, where something must be known of all of it before the first pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ds_vshape.health.waits import is_ended_wait


class DrawnBatch:
    """The micro-batches of one batch on one rank.

    Args:
        draw: returns the next (inputs, labels) of the data.
        keeps_inputs: whether this rank needs the inputs.
    """

    def __init__(self, draw: Callable[[], tuple[Any, Any]], keeps_inputs: bool) -> None:
        self._draw, self._keeps_inputs = draw, keeps_inputs
        self._drawn: deque[tuple[Any, Any] | Exception] = deque()
        # How many numbers the inputs of each micro-batch have; fewer than micro-batches where drawing has failed.
        self.sizes: list[int] = []

    def draw(self, micro_batches: int, look: Callable[[Any], None]) -> None:
        """Draw so many micro-batches, and let `look` see the labels of each. The first error of either is raised when
        its micro-batch is taken; what is drawn after it isn't kept."""
        self.forget()
        failed = False
        for _ in range(micro_batches):
            try:
                sample = self._draw()
                if failed:
                    continue
                # Copies: the data's memory may hold another micro-batch at the next draw.
                inputs, labels = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), sample)
                look(labels)
            except Exception as error:
                if is_ended_wait(error):
                    raise
                if not failed:
                    self._drawn.append(error)
                failed = True
            else:
                self._drawn.append((inputs if self._keeps_inputs else None, labels))
                self.sizes.append(_size(inputs))

    def reorder(self, order: Sequence[int]) -> None:
        """Let micro-batch order[i] be taken in place i.

        Where drawing has failed, its error is raised in the first place: other ranks may have data in another order.
        """
        if len(self.sizes) == len(order):
            self._drawn = deque(self._drawn[place] for place in order)
        elif self._drawn:
            self._drawn = deque([self._drawn.pop()])

    def take(self) -> tuple[Any, Any]:
        """The inputs and labels of the next micro-batch; raises what drawing it, or a look at it, has raised."""
        drawn = self._drawn.popleft()
        if isinstance(drawn, Exception):
            raise drawn
        return drawn

    def forget(self) -> None:
        """Drop what is left of a batch that has failed."""
        self._drawn.clear()
        self.sizes.clear()


def _size(inputs: Any) -> int:
    """The numbers in the first tensor of `inputs`: of token ids the number of tokens, padding included."""
    return next((leaf.numel() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), 0)
