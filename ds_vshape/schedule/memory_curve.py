"""How much a rank keeps over time: the curve whose highest point is its peak."""

from __future__ import annotations

from collections.abc import Sequence

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.timeline import Span


def memory_curve(spans: Sequence[Span], activations: Activations) -> list[tuple[float, float]]:
    """(time, what is alive from then on) at each change on the rank with these spans, in order.

    F takes its memory when it starts; the other passes give theirs back when they end. Memory that is taken again
    at once leaves no dip. `activations.peaks` is the maximum, in the same unit.
    """
    curve: list[tuple[float, float]] = []
    alive = 0.0
    for span in spans:
        change = activations.change(span.work)
        if change:
            alive += change
            time = span.start if span.work.kind is Kind.F else span.end
            if curve and curve[-1][0] == time and curve[-1][1] <= alive:
                curve.pop()
            curve.append((time, alive))
    return curve
