"""Random programs through the split and through plain autograd (split_programs/README.md), and whether that finds
faults: some are planted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, find, given, settings
from split_programs.campaign import Tally
from split_programs.program import Program, Step, evaluate
from split_programs.run import Fault, Invalid, check
from split_programs.steps import HOLDERS, LEAVES
from split_programs.strategies import AWAITED, programs
from torch import Tensor

from ds_vshape.split_backward import MATRIX_OPERATORS, Operators, function, matrix, store, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
EXAMPLES = 300


def test_random_programs_equal_plain_autograd() -> None:
    tally = Tally()

    @settings(max_examples=EXAMPLES, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(programs)
    def many(program: Program) -> None:
        tally.run(program)

    many()
    # Else it shows less than it seems to.
    assert tally.compared > 0.7 * tally.programs and tally.deferring > 0.5 * tally.programs
    assert tally.steps.keys() == {kind for table in (LEAVES, HOLDERS) for kind, variants in table.items()
                                  if any((kind, variant) not in AWAITED for variant in variants)}


STEPS = [Step(kind, variant, body=(Step("linear", "bias"), Step("matmul")) if table is HOLDERS else ())
         for table in (LEAVES, HOLDERS) for kind, variants in table.items() for variant in variants
         if (kind, variant) not in AWAITED]


def test_each_step_alone() -> None:
    """Between two others, on the first stage of two, with two micro-batches whose W are interleaved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = []
        for step in STEPS:
            for dtype in ("float64", "float32"):
                stage = (Step("linear", "bias"), step, Step("pointwise", "sine"), Step("linear"))
                program = Program((stage, (Step("linear"),)), dtype, 2, (0, 1, 0, 1, 1, 2), operators="all")
                try:
                    check(program)
                except Invalid as reason:
                    refused.append((step.kind, step.variant, str(reason)))
                except Fault as fault:
                    raise Fault(f"{program}: {fault}") from fault
    assert len(refused) < 0.1 * len(STEPS), refused


def test_a_program_is_printed_as_what_makes_it_again() -> None:
    step = Step("residual", body=(Step("linear", "bias", 1),))
    program = Program(((step,), (Step("norm"),)), micro_batches=2, order=(1, 0), fused=True)
    assert evaluate(repr(program)) == program and "dtype" not in repr(program)


def test_orders_are_legal_and_whole() -> None:
    program = Program(((Step("linear"),),) * 3, micro_batches=3, order=(2, 5, 1, 4, 0, 3, 2, 1, 5, 4), pieces=2)
    passes = program.passes()
    assert len(passes) == len(set(passes)) == 3 * 3 * 4
    place = {action: number for number, action in enumerate(passes)}
    for kind, stage, micro_batch, piece in passes:
        before = {"F": ("F", stage - 1, micro_batch, 0), "B": ("B", stage + 1, micro_batch, 0),
                  "W": ("B", stage, micro_batch, 0) if piece == 0 else ("W", stage, micro_batch, 0)}[kind]
        assert before not in place or place[before] < place[kind, stage, micro_batch, piece]


# Planted faults: each is found, and the program that shows it is small.


def smallest(operators: Operators | None = None) -> Program:
    def is_faulty(program: Program) -> bool:
        try:
            check(program, operators)
        except Invalid:
            return False
        except Fault:
            return True
        return False

    return find(programs, is_faulty, settings=settings(
        max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink]))


class Doubled(matrix.Linear):
    """A wrong weight gradient."""

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Any:
        return tuple(None if found is None else 2 * found for found in matrix.Linear.backward_weight(ctx, gradient))

    accumulate_weight = classmethod(  # type: ignore[assignment]
        lambda cls, ctx, buffers, gradient: cls.backward_weight(ctx, gradient))


def wrong_for_strided(store: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    """Wrong only where the input isn't contiguous."""
    if input.is_contiguous() or not weights.is_deferrable(weight) or not weights.is_plain_bias(bias, weight.size(0)):
        return matrix.linear(store, input, weight, bias)
    value = Doubled.apply_split(store, input.reshape(-1, input.size(-1)), weight, bias)
    return value if value is NotImplemented else value.view(*input.shape[:-1], weight.size(0))


def without_bias(store: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    """Forgets that a bias may be trained."""
    if not weights.is_deferrable(weight) or input.dim() != 3:
        return NotImplemented
    detached = None if bias is None else bias.detach()
    return matrix.linear(store, input, weight, detached)


def plant_wrong_operator(patch: pytest.MonkeyPatch) -> Operators:
    return {**MATRIX_OPERATORS, F.linear: wrong_for_strided}


def plant_lost_bias(patch: pytest.MonkeyPatch) -> Operators:
    return {**MATRIX_OPERATORS, F.linear: without_bias}


def plant_missing_guard(patch: pytest.MonkeyPatch) -> None:
    """Defers whatever a run of autograd is for, and whatever waits for the gradient."""
    def careless(weight: Any) -> bool:
        return type(weight) is torch.nn.Parameter and weight.requires_grad

    for module in (weights, function, matrix):
        patch.setattr(module, "is_deferrable", careless)
    patch.setattr(function, "_only_adds", lambda parameter, node: True)


def plant_missing_sum(patch: pytest.MonkeyPatch) -> None:
    """The gradients of a weight's other uses are dropped."""
    finish = store.WeightGradientStore._finish_use

    def forgetful(self: Any, target: Any, gradient: Any, accumulator: Any) -> None:
        self._partial_sums.pop(target, None)
        finish(self, target, gradient, accumulator)

    patch.setattr(store.WeightGradientStore, "_finish_use", forgetful)


@pytest.mark.parametrize(("plant", "kinds"), [
    (plant_wrong_operator, {"linear"}),
    (plant_lost_bias, {"linear"}),
    (plant_missing_guard, set()),
    (plant_missing_sum, set()),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_found_and_shrunk(plant: Callable[[pytest.MonkeyPatch], Operators | None],
                                             kinds: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = smallest(plant(monkeypatch))
    found = list(program.walk())
    assert len(found) <= 3 and program.micro_batches == len(program.stages) == 1, program
    assert kinds <= {step.kind for step in found}, program
