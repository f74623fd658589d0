"""A program for the split: data alone, so that hypothesis shrinks it and prints it.

A stage is a list of steps, each of which makes of x (BATCH, SEQUENCE, WIDTH) another x of that shape. A step may hold
others: those of a checkpoint, say. Weights are numbers in a small pool, so that steps share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

BATCH, SEQUENCE, WIDTH = 2, 3, 4
ROWS = BATCH * SEQUENCE
FROZEN = 2  # The weights of this number aren't trained; 0 and 1 are.

Pass = tuple[str, int, int, int]  # its kind ("F", "B", "W"), the stage, the micro-batch, the piece of W


class _Shown:
    """What differs from the defaults, as Python that makes it again."""

    def __repr__(self) -> str:
        given = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self)  # type: ignore[arg-type]
                 if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Step(_Shown):
    """`kind` and `variant` say what it does (steps.py), `weight` which weights it uses, `body` what runs inside."""

    kind: str
    variant: str = ""
    weight: int = 0
    body: tuple[Step, ...] = ()

    def walk(self) -> Iterator[Step]:
        yield self
        for step in self.body:
            yield from step.walk()


@dataclass(frozen=True, repr=False)
class Program(_Shown):
    """What is run, and in which order.

    dtype       of all weights and inputs
    order       which of the passes that may run next does, counted among them; 0 when it's used up
    pieces      of each W
    fused       whether sums of gradients may be added to in place
    operators   "matrix" or "all"
    tied        whether all stages use the same weights
    leaf        whether a stage gets its input as a leaf, not as what an operator made of one
    wanted      whether the first stage's input wants a gradient
    around      what autocast is around: "" (nothing), "F", or "FBW"
    """

    stages: tuple[tuple[Step, ...], ...]
    dtype: str = "float64"
    micro_batches: int = 1
    order: tuple[int, ...] = ()
    pieces: int = 1
    fused: bool = False
    operators: str = "matrix"
    tied: bool = False
    leaf: bool = False
    wanted: bool = False
    around: str = ""

    def walk(self) -> Iterator[Step]:
        for stage in self.stages:
            for step in stage:
                yield from step.walk()

    def passes(self) -> list[Pass]:
        """All passes in a legal order: each after what it needs, and those of a stage by micro-batch."""
        done: set[Pass] = set()
        ordered: list[Pass] = []
        choices: list[int] = list(self.order)
        while True:
            candidates = [self._next(kind, stage, done) for kind in "WBF" for stage in range(len(self.stages))]
            ready = [action for action in candidates if action and self._needs(action) <= done]
            if not ready:
                return ordered
            chosen = ready[choices.pop(0) % len(ready) if choices else 0]
            done.add(chosen)
            ordered.append(chosen)

    def _next(self, kind: str, stage: int, done: set[Pass]) -> Pass | None:
        for micro_batch in range(self.micro_batches):
            for piece in range(self.pieces if kind == "W" else 1):
                if (kind, stage, micro_batch, piece) not in done:
                    return kind, stage, micro_batch, piece
        return None

    def _needs(self, action: Pass) -> set[Pass]:
        kind, stage, micro_batch, _ = action
        if kind == "F":
            return {("F", stage - 1, micro_batch, 0)} if stage else set()
        if kind == "W":
            return {("B", stage, micro_batch, 0)}
        last = len(self.stages) - 1
        return {("F", stage, micro_batch, 0)} | ({("B", stage + 1, micro_batch, 0)} if stage < last else set())


def evaluate(text: str) -> Program:
    """The program that `repr` gave."""
    program: Any = eval(text, {"Program": Program, "Step": Step})
    assert isinstance(program, Program)
    return program
