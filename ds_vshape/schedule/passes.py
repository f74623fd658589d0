"""Passes: the units of work that a schedule puts in order.

Training one micro-batch on one stage takes a forward (F) and a backward. The backward has two independent halves:
B, the gradient of the stage's input, which the previous stage waits for, and W, the gradient of its weights, which
nothing waits for before the optimizer step. BW is both at once (an ordinary backward).

    F2.5     forward of stage 2 on micro-batch 5
    B2.5     its input gradient
    W2.5     its weight gradients
    BW2.5    B2.5 with W2.5 at once

A stage's weight gradients are those of its operators, so a W may be cut between them (pieces.py), and its pieces stand
apart in the order:

    W2.5[0/4]    the first of four pieces of W2.5

What F leaves until its backward takes memory. Three more kinds give it back meanwhile, where a schedule wants that:

    C2.5         recompute: the forward of stage 2 on micro-batch 5 again, since F2.5 kept only what that takes
    C2.5[3]      only of the stage's first 3 layers: F2.5 kept what all others leave
    O2.5         offload: here what F2.5 left is on the host, and its memory on the device is free. A copy of it started
                 right after F2.5; O2.5 waits for its end
    R2.5         reload: here memory is taken again and the copy back starts; what needs it (C2.5, B2.5 or BW2.5) waits
                 for its end

A rank has an engine for copies in each direction, which copies one after another: to the host in the order of the Fs,
back in the order of the Rs.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple, Self


class Kind(str, enum.Enum):
    """The kinds of pass; the value is the notation."""

    F = "F"
    B = "B"
    W = "W"
    BW = "BW"
    C = "C"
    O = "O"  # noqa: E741
    R = "R"

    # Enum's own is a function in Python.
    __hash__ = str.__hash__

    def __str__(self) -> str:
        return self.value

    @property
    def gives_input_gradient(self) -> bool:
        """Whether the previous stage's backward may start when this pass ends."""
        return self in (Kind.B, Kind.BW)

    @property
    def gives_weight_gradients(self) -> bool:
        """Whether it computes gradients of the stage's weights."""
        return self in (Kind.W, Kind.BW)

    @property
    def is_copy(self) -> bool:
        """Whether the rank's copy engines do it, and the rank itself only starts it or waits for it."""
        return self in (Kind.O, Kind.R)

    @property
    def is_optional(self) -> bool:
        """Whether a micro-batch may go without it: it gives memory back before the backward."""
        return self in (Kind.C, Kind.O, Kind.R)


_NOTATION = re.compile(r"(F|BW|B|W|C|O|R)(\d+)\.(\d+)(?:\[(\d+)(?:/(\d+))?\])?")


# A plan of many ranks makes and looks up hundreds of thousands of passes: tuples do that in C.
class _Fields(NamedTuple):
    kind: Kind
    stage: int
    micro_batch: int
    piece: int
    pieces: int
    layers: int


class Pass(_Fields):
    """One unit of work: `kind` on `stage` for `micro_batch` (both counted from 0).

    A W may be `piece` (counted from 0) of `pieces`; everything else is whole. A C may be of the stage's first `layers`
    alone; 0 stands for all. ValueError for other pieces and layers.
    """

    __slots__ = ()

    def __new__(cls, kind: Kind, stage: int, micro_batch: int, piece: int = 0, pieces: int = 1,
                layers: int = 0) -> Self:
        self = tuple.__new__(cls, (kind, stage, micro_batch, piece, pieces, layers))
        if (piece or pieces != 1) and (not 0 <= piece < pieces or kind is not Kind.W):
            raise ValueError(f"{self!r} isn't a pass: only W has pieces, which count from 0")
        if layers and (layers < 0 or kind is not Kind.C):
            raise ValueError(f"{self!r} isn't a pass: only C has a number of layers")
        return self

    def __repr__(self) -> str:
        part = f"[{self.piece}/{self.pieces}]" if self.pieces != 1 else f"[{self.layers}]" if self.layers else ""
        return f"{self.kind}{self.stage}.{self.micro_batch}{part}"

    def later(self, micro_batches: int) -> Pass:
        """The same pass for a micro-batch that comes so many later."""
        return Pass(self.kind, self.stage, self.micro_batch + micro_batches, self.piece, self.pieces, self.layers)

    @property
    def frees_activations(self) -> bool:
        """Whether nothing of the micro-batch is alive on this stage when this pass ends."""
        return self.kind.gives_weight_gradients and self.piece == self.pieces - 1

    def cut(self, pieces: int) -> tuple[Pass, ...]:
        """This W in `pieces` pieces."""
        return tuple(Pass(self.kind, self.stage, self.micro_batch, piece, pieces) for piece in range(pieces))

    @classmethod
    def parse(cls, text: str) -> Pass:
        """The pass with the notation `text`, as `repr` writes it. Raises ValueError for other texts."""
        match = _NOTATION.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} isn't a pass: write kind, stage and micro-batch like F2.5, "
                             f"with kind {', '.join(Kind)}")
        kind, stage, micro_batch, number, pieces = match.groups()
        if number is not None and pieces is None:
            if not int(number):
                raise ValueError(f"{text!r} isn't a pass: of the layers that C runs there is at least 1")
            return cls(Kind(kind), int(stage), int(micro_batch), layers=int(number))
        return cls(Kind(kind), int(stage), int(micro_batch), int(number or 0), int(pieces or 1))


def F(stage: int, micro_batch: int) -> Pass:
    """The forward of `stage` on `micro_batch`."""
    return Pass(Kind.F, stage, micro_batch)


def B(stage: int, micro_batch: int) -> Pass:
    """The input gradient of `stage` on `micro_batch`."""
    return Pass(Kind.B, stage, micro_batch)


def W(stage: int, micro_batch: int) -> Pass:
    """The weight gradients of `stage` on `micro_batch`."""
    return Pass(Kind.W, stage, micro_batch)


def BW(stage: int, micro_batch: int) -> Pass:
    """The whole backward of `stage` on `micro_batch`."""
    return Pass(Kind.BW, stage, micro_batch)


def C(stage: int, micro_batch: int, layers: int = 0) -> Pass:
    """The forward of `stage` on `micro_batch` again, or of its first `layers`."""
    return Pass(Kind.C, stage, micro_batch, layers=layers)


def O(stage: int, micro_batch: int) -> Pass:  # noqa: E743
    """Here what F of `stage` on `micro_batch` left is on the host."""
    return Pass(Kind.O, stage, micro_batch)


def R(stage: int, micro_batch: int) -> Pass:
    """Here what F of `stage` on `micro_batch` left is started to come back from the host."""
    return Pass(Kind.R, stage, micro_batch)
