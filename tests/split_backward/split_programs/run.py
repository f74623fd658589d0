"""A program run twice, split and not, in the same order of passes; and what may differ.

Equal bit for bit: outputs, input gradients, what hooks saw, and the gradients of each weight, except where the order
of a sum differs by construction. There a tolerance holds:

    fused       a product is added to the sum of micro-batches in one rounding
    mixed       some uses of a weight were deferred and others not
    several     plain autograd accumulated more than once in a pass: reentrant checkpoints, a backward in a forward
    tied        stages share weights, and their W come in another order than their B
    rms_norm    split, gives one gradient of its input; torch's own gives two where it is composed, as on a CPU, and
                each is added to those of other uses of the input. Everything before such a norm is off by roundings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from split_programs.program import BATCH, SEQUENCE, WIDTH, Pass, Program
from split_programs.steps import Stage
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ds_vshape.runtime.gradients import InGrad
from ds_vshape.split_backward import (ALL_OPERATORS, MATRIX_OPERATORS, GradientAccumulator, Operators, SplitBackward,
                                      SplitForward, WeightGradientStore, WholeGradients)

# How far a gradient may be off where orders differ, of the length of the gradient and one.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1}
LOW_PRECISION = 0.1

# What the split may refuse, in these words, where plain autograd goes on.
REFUSALS = ("modified by an inplace operation between its input-gradient pass",)


class Invalid(Exception):
    """Plain autograd refuses the program, or its numbers overflow: nothing to compare with."""


class Fault(AssertionError):
    """The split's numbers aren't plain autograd's, or it fails where that doesn't."""


@dataclass
class Outcome:
    """What a run leaves behind."""

    outputs: list[Tensor] = field(default_factory=list)
    input_gradients: dict[Pass, Tensor | None] = field(default_factory=dict)
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    seen: dict[tuple[str, Pass], list[Tensor | None]] = field(default_factory=lambda: defaultdict(list))
    autograds: dict[tuple[str, Pass], int] = field(default_factory=lambda: defaultdict(int))
    delivered: set[str] = field(default_factory=set)
    entries: int = 0


class Run:
    """One run of a program, split if there are operators."""

    def __init__(self, program: Program, operators: Operators | None) -> None:
        self._program, self._operators = program, operators
        self._dtype = getattr(torch, program.dtype)
        self.outcome = Outcome()
        self._pass: Pass = ("", 0, 0, 0)
        self._weights = nn.ParameterDict()
        made = self._made if operators is None else None
        self._stages = [Stage(program, number, self._weights, self._log, made)
                        for number in range(len(program.stages))]
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._roots: dict[tuple[int, int], Any] = {}
        self._gradients: dict[tuple[int, int], Tensor | None] = {}
        self._stores: dict[tuple[int, int], WeightGradientStore] = defaultdict(WeightGradientStore)
        self._delivery = _Recorded(program.fused, self._name, self.outcome.delivered)

    def run(self) -> Outcome:
        with _autocast(self._program.around == "FBW"):
            for self._pass in self._program.passes():
                kind, stage, micro_batch, piece = self._pass
                if kind == "W":
                    if self._operators is not None:
                        self._stores[stage, micro_batch].run_piece(piece, self._program.pieces, self._delivery)
                    continue
                with self._watched():
                    (self._forward if kind == "F" else self._backward)(stage, micro_batch)
                self.outcome.entries += len(self._stores[stage, micro_batch]) if kind == "B" else 0
        self.outcome.weights = dict(self._weights.items())
        return self.outcome

    def _mode(self, kind: type[SplitForward], key: tuple[int, int]) -> AbstractContextManager[Any]:
        return nullcontext() if self._operators is None else kind(self._stores[key], self._operators)

    def _forward(self, stage: int, micro_batch: int) -> None:
        key = stage, micro_batch
        if stage:
            received = self._inputs[key]
            leaf = received.detach().requires_grad_(received.requires_grad)
        else:
            leaf = _random((BATCH, SEQUENCE, WIDTH), micro_batch).to(self._dtype).requires_grad_(self._program.wanted)
        self._inputs[key] = leaf
        module = self._stages[stage]
        module.micro_batch = micro_batch
        torch.default_generator.manual_seed(100 * stage + micro_batch)
        with self._mode(SplitForward, key), _autocast(self._program.around == "F"):
            output = module(leaf if self._program.leaf else leaf.clone())
        if stage + 1 == len(self._stages):
            self.outcome.outputs.append(output.detach().clone())
            self._gradients[key] = _random(output.shape, 50 + micro_batch).to(output.dtype)
        else:
            self._inputs[stage + 1, micro_batch] = output
        self._roots[key] = get_gradient_edge(output) if output.requires_grad else None

    def _backward(self, stage: int, micro_batch: int) -> None:
        key = stage, micro_batch
        root, gradient = self._roots.pop(key), self._gradients.pop(key)
        if root is not None and gradient is not None:
            with self._mode(SplitBackward, key):
                torch.autograd.backward([root], [gradient])
        found = self._inputs.pop(key).grad
        self.outcome.input_gradients[self._pass] = None if found is None else found.clone()
        if stage:
            self._gradients[stage - 1, micro_batch] = found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note for which weights autograd accumulates in this pass; hooks of a plain run count how often."""
        if self._operators is None:
            yield
            return
        before = {name: _state(parameter) for name, parameter in self._weights.items()}
        yield
        for name, parameter in self._weights.items():
            if _state(parameter) != before.get(name, (None, 0)):
                self.outcome.autograds[name, self._pass] += 1

    def _made(self, parameter: Tensor) -> None:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, parameter: Tensor) -> None:
        self.outcome.autograds[self._name(parameter), self._pass] += 1

    def _name(self, parameter: Tensor) -> str:
        return next(name for name, known in self._weights.items() if known is parameter)

    def _log(self, name: str, seen: Tensor | None) -> None:
        self.outcome.seen[name, self._pass].append(None if seen is None else seen.detach().clone())


class _Recorded:
    """`InGrad`, with a note of what it was given."""

    def __init__(self, fused: bool, name: Any, delivered: set[str]) -> None:
        self._place: GradientAccumulator = InGrad() if fused else WholeGradients(InGrad().add)
        self._name, self._delivered = name, delivered

    def add(self, parameter: nn.Parameter, gradient: Tensor, /) -> None:
        self._delivered.add(self._name(parameter))
        self._place.add(parameter, gradient)

    def buffer(self, parameter: nn.Parameter, /) -> Tensor | None:
        self._delivered.add(self._name(parameter))
        return self._place.buffer(parameter)


def _state(parameter: Tensor) -> tuple[int | None, int]:
    return (None, 0) if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


def _random(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _autocast(enabled: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def _is_finite(tensors: Any) -> bool:
    return all(tensor is None or bool(torch.isfinite(tensor.to_dense()).all()) for tensor in tensors)


def plain(program: Program) -> Outcome:
    """The oracle; Invalid where it has no numbers to compare with."""
    try:
        outcome = Run(program, None).run()
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    if not _is_finite([*outcome.outputs, *(weight.grad for weight in outcome.weights.values())]):
        raise Invalid("numbers overflow")
    return outcome


def check(program: Program, operators: Operators | None = None) -> Outcome:
    """The split's outcome; Fault if it isn't plain autograd's, Invalid where that has none."""
    expected = plain(program)
    if operators is None:
        operators = ALL_OPERATORS if program.operators == "all" else MATRIX_OPERATORS
    try:
        found = Run(program, operators).run()
    except Exception as error:
        if any(words in str(error) for words in REFUSALS):
            raise Invalid(f"refused by the split: {error}") from error
        raise Fault(f"{type(error).__name__}: {error}") from error
    tolerance = _tolerance(program)
    off = 0.0 if _is_exact_before_weights(program) else tolerance
    _compare("output", dict(enumerate(expected.outputs)), dict(enumerate(found.outputs)), off)
    _compare("input gradient", expected.input_gradients, found.input_gradients, off)
    if expected.seen.keys() != found.seen.keys():
        raise Fault(f"hooks: {sorted(found.seen)} ran, not {sorted(expected.seen)}")
    for hook, seen in expected.seen.items():
        _compare(f"hook {hook}, call", dict(enumerate(seen)), dict(enumerate(found.seen[hook])), off)
    for name, weight in expected.weights.items():
        _compare_weight(program, name, expected, found, weight.grad, found.weights[name].grad)
    return found


def _tolerance(program: Program) -> float:
    is_low = program.around or any(step.kind == "autocast" or step.variant == "bf16" for step in program.walk())
    return LOW_PRECISION if is_low and program.dtype != "float64" else TOLERANCES[program.dtype]


def _is_exact_before_weights(program: Program) -> bool:
    return program.operators != "all" or all((step.kind, step.variant) != ("norm", "rms") for step in program.walk())


def _compare_weight(program: Program, name: str, expected: Outcome, found: Outcome, wanted: Tensor | None,
                    got: Tensor | None) -> None:
    if wanted is None and got is not None and not got.to_dense().any():
        return
    several = any(count > 1 for (weight, _), count in expected.autograds.items() if weight == name)
    in_forwards = any(weight == name and kind == "F" for weight, (kind, *_) in expected.autograds)
    mixed = name in found.delivered and any(weight == name for weight, _ in found.autograds)
    is_exact = _is_exact_before_weights(program) and not (
        program.fused or mixed or several or in_forwards or program.tied and len(program.stages) > 1)
    _compare("gradient of", {name: wanted}, {name: got}, 0.0 if is_exact else _tolerance(program))


def _compare(what: str, expected: dict[Any, Tensor | None], found: dict[Any, Tensor | None], tolerance: float) -> None:
    """Fault if a tensor is further off than `tolerance` of one and its own length."""
    if expected.keys() != found.keys():
        raise Fault(f"{what}: {list(found)}, not {list(expected)}")
    for key, wanted in expected.items():
        got = found[key]
        if wanted is None or got is None:
            if wanted is not got:
                raise Fault(f"{what} {key}: {got}, not {wanted}")
            continue
        wanted, got = wanted.to_dense(), got.to_dense()
        if wanted.dtype != got.dtype or wanted.shape != got.shape:
            raise Fault(f"{what} {key}: {got.dtype} {[*got.shape]}, not {wanted.dtype} {[*wanted.shape]}")
        length, off = (float(tensor.double().norm()) for tensor in (wanted, got.double() - wanted.double()))
        if not torch.equal(wanted, got) and not off <= tolerance * (1 + length):
            raise Fault(f"{what} {key}: off by {off:.2g}, of {length:.2g}; {tolerance:g} is allowed")
