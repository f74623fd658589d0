"""Rows that together hold every pair of two factors' values, instead of all combinations.

    rows = covering({"schedule": ["1f1b", "v-half"], "zero": [0, 1], "dtype": ["fp32", "fp16"]},
                    [{"zero": {0}, "dtype": {"fp16"}}])

An exclusion forbids the rows that have one of its values for each of its factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
Exclusion = Mapping[str, Collection[Any]]


def pairs(row: Row) -> Iterator[frozenset[tuple[str, Any]]]:
    """The pairs of values that a row holds."""
    return map(frozenset, combinations(row.items(), 2))


def is_legal(row: Row, exclusions: Sequence[Exclusion]) -> bool:
    """Whether a row, or the beginning of one, has nothing that is forbidden."""
    return not any(all(factor in row and row[factor] in values for factor, values in exclusion.items())
                   for exclusion in exclusions)


def covering(factors: Mapping[str, Sequence[Any]], exclusions: Sequence[Exclusion] = ()) -> list[Row]:
    """Legal rows that hold each pair of values that any legal row holds: greedy, and the same in every run."""
    wanted = dict.fromkeys(pair for one, other in combinations(factors, 2) for a in factors[one]
                           for b in factors[other] for pair in pairs({one: a, other: b}))

    def complete(row: Row) -> Row | None:
        """`row` with a value for each factor, each time the one that brings most of the pairs still wanted."""
        if not is_legal(row, exclusions):
            return None
        factor = next((factor for factor in factors if factor not in row), None)
        if factor is None:
            return row
        longer = [{**row, factor: value} for value in factors[factor]]
        longer.sort(key=lambda candidate: -sum(pair in wanted for pair in pairs(candidate)))
        return next(filter(None, map(complete, longer)), None)

    rows = []
    while wanted:
        first = next(iter(wanted))
        row = complete(dict(first))
        # A pair without a row is illegal.
        for pair in [first] if row is None else pairs(row):
            wanted.pop(pair, None)
        if row is not None:
            rows.append(row)
    return rows
