"""What crosses a stage boundary stays what it was: memory that a layer writes again, keeps or shares is copied, and an
ordinary result isn't.

The oracle is the same model in one process, where every result is used before the next one is made.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint
from deepspeed.runtime.pipe.module import PipelineError
from internals import new_transfer, place_on_one_rank, replace_ownership, replace_transfers
from pipelines import (BF16_ZERO1, LENGTH, SAMPLES, VOCABULARY, WIDTH, Block, Job, PlainTraining, cross_entropy, data,
                       micro_batch, specs)
from ranks import run_ranks
from torch import Tensor, nn

from ds_vshape.comm.ownership import own
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.schedule.lowering import Content
from ds_vshape.schedule.placement import linear

X = torch.randn(4, 4, requires_grad=True)
WEIGHT, STATIC = nn.Parameter(torch.randn(4, 4)), torch.zeros(4, 4)
ARRAY = numpy.zeros(4)
LINEAR = nn.Linear(4, 4)
KEPT: list[Tensor] = []


def kept(tensor: Tensor) -> Tensor:
    KEPT.append(tensor)
    return tensor


def in_static_memory() -> Tensor:
    out = STATIC.detach()
    out.copy_(X * 2)
    return out


class OutOfStaticMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.mul(x, 2, out=STATIC)
        return STATIC[:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


ORDINARY: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: LINEAR(X), "residual": lambda: X + LINEAR(X), "in place": lambda: (X * 2).add_(LINEAR(X)),
    "saved for the backward": lambda: (X * 2).relu(), "a view of it": lambda: (X * 2).sigmoid().view(16),
    "one of several": lambda: LINEAR(X).chunk(2)[1], "product with a weight": lambda: WEIGHT * 1,
    "integers": lambda: torch.arange(4) + 1, "their view": lambda: (torch.arange(4) + 1).view(2, 2),
    "detached": lambda: LINEAR(X).detach(), "detached and written": lambda: LINEAR(X).detach().mul_(2)}
SHARED: dict[str, Callable[[], Tensor]] = {
    "weight": lambda: WEIGHT, "row of a weight": lambda: WEIGHT[0],
    "expanded weight": lambda: WEIGHT[None].expand(3, 4, 4), "detached weight": lambda: WEIGHT.detach(),
    "a numpy array": lambda: torch.from_numpy(ARRAY), "part of one": lambda: torch.from_numpy(ARRAY)[1:],
    "buffer": lambda: STATIC, "part of a buffer": lambda: STATIC[1:],
    "detached buffer": lambda: STATIC.detach(), "in a buffer, with gradient": in_static_memory,
    "a function's own memory": lambda: OutOfStaticMemory.apply(X), "kept": lambda: kept(LINEAR(X)),
    "kept in part": lambda: kept(torch.arange(4))[1:], "a kept tensor's data": lambda: kept(torch.arange(4)).data}


@pytest.mark.parametrize("case", [*ORDINARY, *SHARED])
def test_only_what_others_may_write_is_copied(case: str) -> None:
    made = {**ORDINARY, **SHARED}[case]()
    root, value, wanted, pointer = made.grad_fn, made.detach().clone(), made.requires_grad, made.data_ptr()
    results: list[Tensor | None] = [None, made]
    del made
    nothing, taken = own(results)
    assert nothing is None and taken is not None and not results
    assert taken.is_leaf and taken.requires_grad == wanted and torch.equal(taken, value)
    assert (taken.data_ptr() == pointer) == (case in ORDINARY), root


def test_members_that_share_memory_are_parted() -> None:
    made = LINEAR(X)
    root, results = made.grad_fn, [made, made, made.detach(), made.view(16), made[1:]]
    del made
    first, *others = own(results)
    assert root is not None and first is not None
    assert len({t.untyped_storage().data_ptr() for t in (first, *others) if t is not None}) == 5


def test_what_is_written_meanwhile_is_an_error() -> None:
    held = Buffers(linear(2), 0)
    place_on_one_rank(held, linear(1))
    memory = LINEAR(X)
    secret, root = memory.detach(), memory.grad_fn
    results: list[Tensor | None] = [memory]
    del memory
    held.hand_over(Content.ACTIVATION, BufferId(0, 0), results, is_tuple=False)
    buffer = held[BufferId(0, 0)]
    secret.zero_()
    with pytest.raises(PipelineError, match="the activation was written to after its stage had passed it on"):
        buffer.check_unwritten(Content.ACTIVATION)
    assert root is not None


# -- engines


class StaticGradient(torch.autograd.Function):
    """The identity, with gradients in memory that the layer uses each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor) -> Tensor:
        ctx.memory = memory
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.memory.copy_(gradient)
        return ctx.memory.view(gradient.shape), None


class Reusing(Block):
    """x, or (x, positions) -> both, in memory that it uses each time; it changes in place what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(5, WIDTH)
        shape = SAMPLES, LENGTH, WIDTH
        self.register_buffer("positions", torch.zeros(shape[:2], dtype=torch.long), persistent=False)
        self.memory, self.gradient = torch.zeros(shape), torch.zeros(shape)

    def forward(self, inputs: Any) -> Any:
        x, positions = inputs if isinstance(inputs, tuple) else (inputs, None)
        x = StaticGradient.apply(x, self.gradient)
        if positions is not None:
            x = x + self.places(positions.remainder_(5).clone())  # It isn't kept for the backward.
        # The product's gradient is new, so that W keeps none of the next layer's memory.
        y = super().forward(x) * 1.1
        self.positions.copy_((y.detach().abs().sum(-1) * 3).long() % 7)
        out = self.memory.detach()
        out.copy_(y)
        return out, self.positions


class Keeping(Block):
    """A block that keeps the gradient of its input, and overwrites it in the next micro-batch."""

    gradient: Tensor | None = None

    def forward(self, inputs: Any) -> Any:
        x, positions = inputs if isinstance(inputs, tuple) else (inputs, None)
        if x.requires_grad:
            x.register_hook(self._keep)
        return super().forward(x) * 1.1, positions

    def _keep(self, gradient: Tensor) -> None:
        if self.gradient is not None:
            self.gradient.zero_()
        self.gradient = gradient.detach().view(-1)


class Embedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 1.1


class First(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)

    def forward(self, inputs: Any) -> Tensor:
        return super().forward(inputs[0] * 1.1)  # That is kept for W, and not the memory of the layer before.


def chosen(block: type[nn.Module]) -> tuple[Any, ...]:
    return (LayerSpec(Embedding), *[LayerSpec(block)] * 6, LayerSpec(First))


def by_name(logits: Tensor, labels: dict[str, list[Tensor]]) -> Tensor:
    return cross_entropy(logits, labels["of tokens"][0])


def reused(batch: int, count: int) -> Iterator[Any]:
    """Micro-batches that all use the same memory."""
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.long)
    labels = {"of tokens": [torch.zeros_like(tokens)]}
    for number in range(count):
        new_tokens, new_labels = micro_batch(batch, number, 0)
        tokens.copy_(new_tokens)
        labels["of tokens"][0].copy_(new_labels)
        yield tokens, labels


class Later:
    """The work of a message that hasn't started yet."""

    def __init__(self) -> None:
        self.transfer, self.started = new_transfer(), threading.Event()

    def wait(self) -> None:
        self.started.wait()
        self.transfer.wait(0)


class Slow:
    """Links that take their time: what is sent is read from memory a while after the send has started, in order."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, daemon=True).start()
        self._begin = replace_transfers(self)

    def __call__(self, transfer: Any, start: Any, tensors: Any, place: int, peer: int) -> None:
        if start.__name__ == "recv":
            self._begin(transfer, start, tensors, place, peer)
            return
        later = Later()
        self._waiting.put((later, start, tensors, place, peer))
        transfer.works.append(later)

    def _deliver(self) -> None:
        while True:
            later, *arguments = self._waiting.get()
            time.sleep(self._seconds)
            self._begin(later.transfer, *arguments)
            later.started.set()


def train_slowly(rank: int, jobs: list[Job]) -> list[list[float]]:
    Slow(0.02)
    results = []
    for job in jobs:
        engine = job.engine(loss_fn=by_name)
        losses = [float(engine.train_batch(reused(batch, job.micro_batches))) for batch in range(3)]
        results.append([*losses, float(engine.eval_batch(reused(9, 4), num_micro_batches=4))])
    return results


@pytest.mark.parametrize("block", [Reusing, Keeping])
@pytest.mark.quick_cases("Keeping")
def test_layers_that_use_memory_again(block: type[nn.Module]) -> None:
    jobs = [Job(schedule, 2, 5, {}, chosen(block)) for schedule in ("v-half", "v-zb", "zb-h1")]
    plain = PlainTraining(jobs[0])
    oracle = plain.train(range(3), 5).losses
    with torch.no_grad():
        oracle.append(sum(float(cross_entropy(plain.model(tokens), labels))
                          for tokens, labels in (micro_batch(9, number, 0) for number in range(4))) / 4)
    for of_rank in run_ranks(2, train_slowly, jobs, timeout=200):
        for job, losses in zip(jobs, of_rank, strict=True):
            assert losses == pytest.approx(oracle, rel=1e-6), job.schedule


def train_uncopied(rank: int) -> str:
    """The error where nothing is copied."""
    replace_ownership(lambda owned, result, others: result.numbers.requires_grad_(result.requires_grad))
    engine = Job("v-half", 2, 5, {}, chosen(Reusing)).engine(loss_fn=by_name)
    with pytest.raises(PipelineError) as error:
        engine.train_batch(reused(0, 5))
    return str(error.value)


def test_an_engine_tells_of_what_was_written_meanwhile() -> None:
    """Whether or not the message has left by then, and on all ranks."""
    for told in run_ranks(2, train_uncopied):
        assert "was written to after its stage had passed it on" in told


def copies(rank: int, jobs: list[tuple[Job, dict[str, Any]]]) -> list[int]:
    """How many results were copied by batches of training and evaluation."""
    counts: list[int] = []

    def counted(owned: Any, result: Any, others: set[int]) -> Tensor:
        taken: Tensor = owned(result, others)
        counts[-1] += taken.data_ptr() != result.numbers.data_ptr()
        return taken

    replace_ownership(counted)
    for job, options in jobs:
        counts.append(0)
        engine = job.engine(**options)
        for batch in range(3):
            engine.train_batch(data(engine, batch))
        engine.eval_batch(data(engine, 9))
    return counts


@pytest.mark.slow
def test_ordinary_layers_are_not_copied() -> None:
    """Neither their outputs nor their gradients, in any pass, nor where layers are recomputed or measured."""
    recomputed = {"activation_checkpoint_interval": 1}
    layers = tuple(specs(7))
    jobs = [(Job("v-half", 2, 4, {}, layers), {}), (Job("zb-h1", 2, 4, BF16_ZERO1, layers), {}),
            (Job("v-zb", 2, 4, {}, layers), recomputed),
            (Job("1f1b", 2, 4, {}, layers), {**recomputed, "activation_checkpoint_func": non_reentrant_checkpoint})]
    assert run_ranks(2, copies, jobs) == [[0] * len(jobs)] * 2
