"""What a GPT costs on GPUs, from its shape: times of F, B and W, bytes of activations and of what the optimizer keeps.

A model of costs, not a measurement. Forward, for a micro-batch of t tokens in sequences of s, hidden size h,
vocabulary V:

                matrix products   attention    parameters    F leaves (bytes)   B leaves to W (bytes)
    block       24 t h^2          4 t s h      12 h^2        34 t h             32 t h
    embedding   -                 -            (V + s) h     t (h + 8)          t (2h + 8)
    head        2 t h V           -            V h           t (4h + 4V)        t (2h + 2V)

F is products and attention; B is as many products, and 2.5 times the attention (its scores are computed again, as fused
kernels do); W is products alone. 34 t h is the sum of "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198, section 4.1) without what fused attention doesn't keep; what W needs are the inputs (14 t h) and
output gradients (18 t h) of a block's four products. A block that is recomputed leaves its input, 2 t h, and runs F
again in B. With n tensor parallel ranks (and sequence parallel) all of it is divided by n, and two all-reduces of the
block's output are added to F and to B. Nothing overlaps with those, nor with the reduction between data parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times

# bf16 weights, fp32 gradients; fp32 weights and two moments, of which data parallel ranks hold a part each.
BYTES_OF_PARAMETER, BYTES_OF_OPTIMIZER = 6, 12


@dataclass(frozen=True)
class Shape:
    """A GPT; `gpus` are those of the paper's experiments."""

    name: str
    layers: int
    heads: int
    hidden: int
    gpus: int
    vocabulary: int = 50304


@dataclass(frozen=True)
class Machine:
    """GPUs of `flops` a second at most, of which passes reach `efficiency` (F, B, W).

    Bytes a second and seconds of latency of a message inside a node and between nodes.
    """

    flops: float
    efficiency: tuple[float, float, float]
    inside: tuple[float, float]
    between: tuple[float, float]


@dataclass(frozen=True)
class Layer:
    """FLOPs of F, parameters, and bytes of one micro-batch, as in the module's table."""

    products: float
    attention: float
    parameters: float
    whole: float
    kept: float
    recomputed: bool = False


@dataclass(frozen=True)
class Training:
    """A `shape` trained with `samples` sequences of `length` in a micro-batch, and how it is spread over GPUs."""

    shape: Shape
    machine: Machine
    length: int
    samples: int
    micro_batches: int
    ranks: int
    tensor: int = 1
    data: int = 1
    recompute: bool = False

    @property
    def tokens(self) -> int:
        """In a micro-batch."""
        return self.samples * self.length

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Embedding, blocks, head."""
        t, s, h, vocabulary = self.tokens, self.length, self.shape.hidden, self.shape.vocabulary
        embedding = Layer(0, 0, (vocabulary + s) * h, t * (h + 8), t * (2 * h + 8))
        block = Layer(24 * t * h ** 2, 4 * t * s * h, 12 * h ** 2, (2 if self.recompute else 34) * t * h, 32 * t * h,
                      self.recompute)
        head = Layer(2 * t * h * vocabulary, 0, vocabulary * h, t * (4 * h + 4 * vocabulary),
                     t * (2 * h + 2 * vocabulary))
        return (embedding, *[block] * self.shape.layers, head)

    def stages(self, placement: Placement) -> list[Sequence[Layer]]:
        """As many layers in each stage, embedding and head counted as one layer each, as in the paper."""
        each, rest = divmod(len(self.layers), placement.stages)
        if rest:
            raise ValueError(f"{self.shape.name}: {placement.stages} stages don't divide its {len(self.layers)} layers")
        return [self.layers[each * stage:each * (stage + 1)] for stage in range(placement.stages)]

    def times(self, placement: Placement, message: tuple[float, float]) -> Times:
        """Seconds of the passes of each stage; hops by `message`, the machine's `inside` or `between`."""
        rows = [[sum(seconds) for seconds in zip(*map(self._times_of, stage))] for stage in self.stages(placement)]
        forward, input_grad, weight_grad = zip(*rows)
        bandwidth, latency = message
        hop = latency + self._output / self.tensor / bandwidth
        return Times(forward, input_grad, weight_grad, (hop,) * (placement.stages - 1))

    def activations(self, placement: Placement) -> Activations:
        """Bytes of each stage."""
        stages = self.stages(placement)
        return Activations(tuple(sum(layer.whole for layer in stage) / self.tensor for stage in stages),
                           tuple(sum(layer.kept for layer in stage) / self.tensor for stage in stages))

    def state(self, placement: Placement) -> list[float]:
        """Bytes of weights, gradients and optimizer on each rank."""
        each = BYTES_OF_PARAMETER + BYTES_OF_OPTIMIZER / self.data
        return [each * parameters for parameters in self._parameters(placement)]

    def reduction(self, placement: Placement) -> float:
        """Seconds after the passes in which data parallel ranks add up gradients and hand out the new weights."""
        share = (self.data - 1) / self.data
        return share * BYTES_OF_PARAMETER * max(self._parameters(placement)) / self.machine.between[0]

    def mfu(self, seconds: float) -> float:
        """The share of the GPUs' FLOPs that the model needs; recomputation counts as none, attention in full."""
        needed = 3 * sum(layer.products + layer.attention for layer in self.layers) * self.micro_batches
        return needed / (seconds * self.ranks * self.tensor * self.machine.flops)

    def _parameters(self, placement: Placement) -> list[float]:
        stages = self.stages(placement)
        return [sum(layer.parameters for stage in chunks for layer in stages[stage]) / self.tensor
                for chunks in placement.chunks]

    @property
    def _output(self) -> float:
        """Bytes of what a block gives the next one, in bf16."""
        return 2 * self.tokens * self.shape.hidden

    def _times_of(self, layer: Layer) -> tuple[float, float, float]:
        f, b, w = (self.machine.flops * self.tensor * share for share in self.machine.efficiency)
        reductions = 0.0
        if self.tensor > 1 and layer.attention:
            bandwidth, latency = self.machine.inside
            reductions = 2 * (latency + 2 * (self.tensor - 1) / self.tensor * self._output / bandwidth)
        forward = (layer.products + layer.attention) / f + reductions
        input_grad = (layer.products + 2.5 * layer.attention) / b + reductions
        return forward, input_grad + (forward if layer.recomputed else 0.0), layer.products / w
