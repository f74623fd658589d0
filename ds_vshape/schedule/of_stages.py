"""Numbers for each stage: times and sizes that come one a stage, or one for each number of its first layers."""

from __future__ import annotations

from collections.abc import Sequence

from ds_vshape.schedule.passes import Pass


def check_numbers(name: str, values: Sequence[float], count: int, of: str = "stage") -> None:
    """ValueError unless `values` are one finite number of 0 or more for each `of`."""
    if len(values) != count or not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"{name} must be {count} finite numbers of 0 or more, one for each {of}, not {values}")


def check_numbers_of_layers(name: str, values: Sequence[Sequence[float]], count: int) -> None:
    """ValueError unless `values` are such numbers for each stage: one for each number of layers, or one alone."""
    if len(values) != count or not all(values):
        raise ValueError(f"{name} must be {count} rows of numbers, one for each stage, not {values}")
    for stage, row in enumerate(values):
        check_numbers(f"{name}[{stage}]", row, len(row), "number of layers")


def of_layers(action: Pass, values: Sequence[Sequence[float]]) -> float:
    """The number of the layers that the C `action` runs again; ValueError if there is none.

    `values[s][k - 1]` is that of the first k layers of stage s, `values[s][-1]` that of all.
    """
    row = values[action.stage]
    if action.layers > len(row):
        raise ValueError(f"{action}: of stage {action.stage} there are numbers for {len(row)} layers")
    return row[action.layers - 1]
