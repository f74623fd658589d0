"""What a GPT costs, from its shape: times of F, B and W, bytes of activations and of what the optimizer keeps.

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
again in B. Values of 4 bytes take twice the bytes of the table, whose values have 2.

While they run passes need besides (measured in ds_vshape/models/gpt.py):

                F           B           BW                  W
    block       4 t h       18 t h      8 t h + 8 h^2       -
    embedding   4.5 t h     2.5 t h     2 V h               -
    head        2 t V       4 t V       4 t V               -

A block that is recomputed needs in F and in B what it would leave. Among the layers of a stage the pass counts that is
highest above what all of them leave.

The table is Megatron's, whose dropout masks and loss take part of it; in ds_vshape/models/gpt.py (measured) F
leaves 32 t h of a block, 8 t of the embedding, and 4 t h + 2 t V of the head.

With n tensor parallel ranks all of it is divided by n, and two all-reduces of the block's output are added to F and to
B. Without sequence parallel, as in ds_vshape/models/gpt_parallel.py, every rank has embedding and head whole, and of a
block the inputs of both norms and what goes into and comes out of its share, 8 t h of both kinds of bytes. Nothing
overlaps with those all-reduces, nor with the reduction between data parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from ds_vshape.measure.rank_memory import RankMemory, batch_end_bytes
from ds_vshape.schedule.activations import Activations, Working
from ds_vshape.schedule.communicators import communicators_of_ranks
from ds_vshape.schedule.partition.balance import balance
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times


# Layers of ds_vshape/models/gpt.py before the first block and after the last one; here there is one for each two.
ENDS = 2
_FP32 = 4


@dataclass(frozen=True)
class Bytes:
    """Of an activation's value; of a parameter's weight, of its gradient with all sums of it, and of what the optimizer
    keeps for it, of which data parallel ranks hold a part each if it is `shared`; and of a communicator of messages.
    At the end of a batch, for each parameter that a rank steps, `copying` while gradients are copied for the step (0:
    it takes them where they are), and `temporary` while it runs, of one at a time if they are stepped `one_by_one`; and
    the `bucket` of the reduction.

    The default is bf16 with sums in fp32 and ZeRO-1: fp32 weights and two moments are the optimizer's.
    """

    value: int = 2
    weight: int = 2
    gradient: int = 4
    optimizer: int = 12
    shared: bool = True
    communicator: int = 0
    copying: int = 0
    temporary: int = 0
    one_by_one: bool = False
    bucket: int = 0


@dataclass(frozen=True)
class Code:
    """How a GPT is written: bytes that F leaves, as in the module's table, of t h in a block and in the embedding and
    of t V in the head; whether tensor parallel ranks share all of them; whether embedding and head are one weight where
    a rank has both.
    """

    block: float
    embedding: float
    logits: float
    sequence_parallel: bool
    tied: bool


MEGATRON = Code(34, 1, 4, sequence_parallel=True, tied=False)
GPT_PY = Code(32, 0, 2, sequence_parallel=False, tied=True)


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
class Speeds:
    """What devices and messages reach: `flops` a second at most, of which passes reach `efficiency` (F, B, W).

    A message inside a node and one between nodes: bytes a second and seconds of latency. A device's copies to the
    `host`'s memory, and at the same time back: bytes a second each.
    """

    flops: float
    efficiency: tuple[float, float, float]
    inside: tuple[float, float]
    between: tuple[float, float]
    host: float = 10e9


@dataclass(frozen=True)
class Layer:
    """FLOPs of F, parameters, and bytes that F and B leave of one micro-batch, as in the module's table; and that F, B,
    BW and W need while they run; and its largest parameter.
    """

    products: float
    attention: float
    parameters: float
    after_forward: float
    after_backward: float
    working: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    recomputed: bool = False
    largest: float = 0.0


@dataclass(frozen=True)
class TrainingCosts:
    """The costs of training a `shape` with `samples` sequences of `length` in a micro-batch, spread over devices.

    `bounds` are the first layer of each stage and the number of layers, embedding and head included; without them the
    stages have as many layers each, as in the paper.
    """

    shape: Shape
    speeds: Speeds
    length: int
    samples: int
    micro_batches: int
    ranks: int
    tensor: int = 1
    data: int = 1
    recompute: bool = False
    bytes: Bytes = Bytes()
    bounds: tuple[int, ...] | None = None
    code: Code = MEGATRON

    @property
    def tokens(self) -> int:
        """In a micro-batch."""
        return self.samples * self.length

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Embedding, blocks, head."""
        t, s, h, vocabulary = self.tokens, self.length, self.shape.hidden, self.shape.vocabulary
        wide, code = self.bytes.value / 2, self.code
        unit, logits, own = 2 * wide * t * h, 2 * wide * t * vocabulary, self.bytes.value
        again = unit * (code.block / 2 - 1) if self.recompute else 0.0
        embedding = Layer(0, 0, (vocabulary + s) * h, t * (wide * code.embedding * h + 8), t * (2 * wide * h + 8),
                          (2.25 * unit, 1.25 * unit, own * vocabulary * h, 0.0), largest=vocabulary * h)
        block = Layer(24 * t * h ** 2, 4 * t * s * h, 12 * h ** 2,
                      wide * (2 if self.recompute else code.block) * t * h, wide * 32 * t * h,
                      (2 * unit + again, 9 * unit + again, 4 * unit + 4 * own * h ** 2 + again, 0.0), self.recompute,
                      4 * h ** 2)
        head = Layer(2 * t * h * vocabulary, 0, vocabulary * h, wide * t * (4 * h + code.logits * vocabulary),
                     wide * t * (2 * h + 2 * vocabulary),
                     (logits, 2 * logits, 2 * logits, 0.0), largest=vocabulary * h)
        return (embedding, *[block] * self.shape.layers, head)

    @property
    def partition(self) -> list[int]:
        """PipelineModule's: the first of ds_vshape/models/gpt.py's layers on each stage, and their number."""
        assert self.bounds is not None
        first, *inner, last = self.bounds
        return [first, *(bound + 1 for bound in inner), last + ENDS]

    def stages(self, placement: Placement) -> list[Sequence[Layer]]:
        """The layers of each stage."""
        if self.bounds is not None:
            return [self.layers[start:stop] for start, stop in pairwise(self.bounds)]
        each, rest = divmod(len(self.layers), placement.stages)
        if rest:
            raise ValueError(f"{self.shape.name}: {placement.stages} stages don't divide its {len(self.layers)} layers")
        return [self.layers[each * stage:each * (stage + 1)] for stage in range(placement.stages)]

    def times(self, placement: Placement, message: tuple[float, float]) -> Times:
        """Seconds of the passes of each stage, of recomputation and of copies; hops by `message`, `speeds.inside` or
        `speeds.between`."""
        of_layers = [[self._times_of(layer) for layer in stage] for stage in self.stages(placement)]
        forward, input_grad, weight_grad = zip(*(map(sum, zip(*stage)) for stage in of_layers))
        bandwidth, latency = message
        hop = latency + self._output / self.tensor / bandwidth
        sizes = self.activations(placement)
        copies = tuple(size / self.speeds.host for size in sizes.after_forward)
        return Times(forward, input_grad, weight_grad, (hop,) * (placement.stages - 1),
                     recompute=tuple(tuple(accumulate(seconds for seconds, _, _ in stage)) for stage in of_layers),
                     offload=copies, reload=copies,
                     copied=tuple(tuple(left / (whole or 1.0) for left in row)
                                  for row, whole in zip(sizes.recomputed, sizes.after_forward)))

    def activations(self, placement: Placement) -> Activations:
        """Bytes of each stage. Of layers that are recomputed the stage's input is left."""
        stages = [[self._share(layer) for layer in stage] for stage in self.stages(placement)]
        left = [[layer.after_forward for layer in stage] for stage in stages]
        whole = tuple(map(sum, left))
        inputs = (0.0, *(self._output for _ in stages[1:]))
        return Activations(
            whole, tuple(sum(layer.after_backward for layer in stage) for stage in stages),
            recomputed=tuple(tuple(min(of_stage, given + of_stage - of_first) for of_first in accumulate(sizes))
                             for given, of_stage, sizes in zip(inputs, whole, left)))

    def working(self, placement: Placement) -> Working:
        """Bytes that the passes of each stage need while they run, and of a message."""
        rows = [_working([self._share(layer) for layer in stage]) for stage in self.stages(placement)]
        f, b, bw, w = zip(*rows)
        return Working(f, b, bw, w, (self._output,) * placement.stages)

    def state(self, placement: Placement) -> list[RankMemory]:
        """Bytes of each rank besides what passes need."""
        stages, communicators = self.stages(placement), communicators_of_ranks(placement)
        largest = [max(self._share(layer).largest for stage in chunks for layer in stages[stage])
                   for chunks in placement.chunks]
        return [self._state(count, most, self.bytes.communicator * number)
                for count, most, number in zip(self._parameters(placement), largest, communicators, strict=True)]

    def _state(self, parameters: float, largest: float, communicators: int) -> RankMemory:
        sizes, stepped = self.bytes, parameters / (self.data if self.bytes.shared else 1)
        gradients = round(sizes.gradient * parameters)
        flat = round(_FP32 * stepped) if sizes.copying else 0
        at_end = batch_end_bytes(gradients, round(sizes.temporary * (largest if sizes.one_by_one else stepped)), flat,
                                 round(sizes.copying * stepped), sizes.bucket)
        return RankMemory(round(sizes.weight * parameters), gradients, round(sizes.optimizer * stepped), None, None,
                          communicators=communicators, batch_end=at_end)

    def reduction(self, placement: Placement) -> float:
        """Seconds after the passes in which data parallel ranks add up gradients and hand out the new weights, or where
        each has the whole optimizer, the sums."""
        share = (self.data - 1) / self.data
        handed_out = self.bytes.weight if self.bytes.shared else self.bytes.gradient
        return share * (self.bytes.gradient + handed_out) * max(self._parameters(placement)) / self.speeds.between[0]

    def mfu(self, seconds: float) -> float:
        """The share of the GPUs' FLOPs that the model needs; recomputation counts as none, attention in full."""
        needed = 3 * sum(layer.products + layer.attention for layer in self.layers) * self.micro_batches
        return needed / (seconds * self.ranks * self.tensor * self.speeds.flops)

    def _parameters(self, placement: Placement) -> list[float]:
        stages = self.stages(placement)
        counts = [sum(self._share(layer).parameters for stage in chunks for layer in stages[stage])
                  for chunks in placement.chunks]
        first, last = placement.rank_of(0), placement.rank_of(placement.last_stage)
        if self.code.tied and first == last:
            counts[last] -= self._share(self.layers[-1]).parameters
        return counts

    @property
    def _output(self) -> float:
        """Bytes of what a block gives the next one."""
        return self.bytes.value * self.tokens * self.shape.hidden

    def balanced(self, placement: Placement) -> TrainingCosts:
        """With the bounds that give all ranks about as much to do."""
        return replace(self, bounds=balance([sum(self._times_of(layer)) for layer in self.layers], placement))

    def _share(self, layer: Layer) -> Layer:
        """What one of the tensor parallel ranks has of it."""
        if not layer.attention and not self.code.sequence_parallel:
            return layer
        everywhere = 0.0 if self.code.sequence_parallel else 4 * self._output
        f, b, bw, w = layer.working
        return replace(layer, products=layer.products / self.tensor, attention=layer.attention / self.tensor,
                       parameters=layer.parameters / self.tensor,
                       after_forward=everywhere + max(0.0, layer.after_forward - everywhere) / self.tensor,
                       after_backward=everywhere + (layer.after_backward - everywhere) / self.tensor,
                       working=(f / self.tensor, b / self.tensor, bw / self.tensor, w / self.tensor),
                       largest=layer.largest / self.tensor)

    def _times_of(self, layer: Layer) -> tuple[float, float, float]:
        f, b, w = (self.speeds.flops * share for share in self.speeds.efficiency)
        reductions = 0.0
        if self.tensor > 1 and layer.attention:
            bandwidth, latency = self.speeds.inside
            reductions = 2 * (latency + 2 * (self.tensor - 1) / self.tensor * self._output / bandwidth)
        share = self._share(layer)
        forward = (share.products + share.attention) / f + reductions
        input_grad = (share.products + 2.5 * share.attention) / b + reductions
        return forward, input_grad + (forward if layer.recomputed else 0.0), share.products / w


def _working(layers: Sequence[Layer]) -> tuple[float, float, float, float]:
    """What F, B, BW and W of a stage need besides what its F leaves, and W besides what its B leaves."""
    whole, kept = sum(layer.after_forward for layer in layers), sum(layer.after_backward for layer in layers)
    before, of_f, of_b, of_bw, of_w = 0.0, [0.0], [0.0], [0.0], [0.0]
    behind = kept
    for layer in layers:
        f, b, bw, w = layer.working
        behind -= layer.after_backward
        up_to_here = before + layer.after_forward
        of_f.append(up_to_here + f - whole)
        # Layers behind it have run, and keep what their W needs.
        of_b.append(up_to_here + behind + b - whole)
        of_bw.append(up_to_here + bw - whole)
        of_w.append(w)
        before = up_to_here
    return max(of_f), max(of_b), max(of_bw), max(of_w)
