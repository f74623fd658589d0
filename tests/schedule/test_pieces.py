"""Where a W is cut, against all places where it could be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.pieces import cut


@given(st.lists(st.sampled_from((0.0, 0.1, 1.0, 1.5, 40.0)), max_size=8).map(tuple), st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_pieces_are_as_even_as_can_be(costs: tuple[float, ...], pieces: int) -> None:
    found = cut(costs, pieces)
    assert len(found) == min(pieces, len(costs))
    if costs:
        assert 0 < found[0] and found[-1] == len(costs) and all(start < end for start, end in pairwise(found))

    def squares(ends: tuple[int, ...]) -> float:
        return sum(sum(costs[start:end]) ** 2 for start, end in pairwise((0, *ends)))

    every = [(*ends, len(costs)) for ends in combinations(range(1, len(costs)), len(found) - 1)] if costs else [()]
    assert squares(found) == pytest.approx(min(map(squares, every)))


def test_a_head_is_a_piece_of_its_own() -> None:
    assert cut((1, 1, 1, 1, 8), 2) == (4, 5)
    assert cut((1, 1, 1, 1, 8), 4) == (1, 2, 4, 5)
