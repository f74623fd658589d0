"""The covering rows of tests/engine/pairwise.py, against all combinations."""

from __future__ import annotations

from itertools import product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pairwise import Exclusion, Row, covering, is_legal, pairs


def test_a_small_one_by_hand() -> None:
    rows = covering({"a": [1, 2], "b": [1, 2], "c": [1, 2]})
    assert [[row[factor] for factor in "abc"] for row in rows] == [[1, 1, 1], [1, 2, 2], [2, 1, 2], [2, 2, 1]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, list[int]], list[Exclusion]]:
    factors = {name: list(range(draw(st.integers(1, 4)))) for name in "abcd"[:draw(st.integers(2, 4))]}
    exclusion = st.dictionaries(st.sampled_from(list(factors)), st.sets(st.integers(0, 3), min_size=1), min_size=1)
    return factors, draw(st.lists(exclusion, max_size=4))


@given(problems())
def test_every_legal_pair_is_in_a_legal_row(problem: Any) -> None:
    factors, exclusions = problem
    rows = covering(factors, exclusions)
    legal: list[Row] = [row for values in product(*factors.values())
                        if is_legal(row := dict(zip(factors, values, strict=True)), exclusions)]
    assert all(row in legal for row in rows)
    assert {pair for row in rows for pair in pairs(row)} == {pair for row in legal for pair in pairs(row)}
    assert len(rows) <= len(legal)


def test_an_exclusion_needs_all_of_its_factors() -> None:
    assert is_legal({"a": 1, "b": 2}, [{"a": {1}, "b": {1}}, {"c": {1}}])
    assert not is_legal({"a": 1, "b": 2}, [{"a": {1}, "b": {1, 2}}])
