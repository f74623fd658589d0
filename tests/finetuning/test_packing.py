"""Samples in rows, against a search through all ways to put them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_vshape.finetuning.packing import pack


def least_rows(lengths: Sequence[int], row: int) -> int:
    """By trying every row for every sample."""
    best = len(lengths)

    def put(place: int, used: list[int]) -> None:
        nonlocal best
        if len(used) >= best:
            return
        if place == len(lengths):
            best = len(used)
            return
        for at, tokens in enumerate(used):
            if tokens + lengths[place] <= row:
                put(place + 1, [*used[:at], tokens + lengths[place], *used[at + 1:]])
        put(place + 1, [*used, lengths[place]])

    put(0, [])
    return best


@given(st.lists(st.integers(1, 12), max_size=8))
def test_every_sample_is_in_one_row_and_few_rows_are_needed(lengths: list[int]) -> None:
    rows = pack(lengths, 12)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in row) <= 12 for row in rows)
    assert len(rows) <= 11 / 9 * least_rows(lengths, 12) + 1


@pytest.mark.parametrize("length", [0, 13])
def test_what_fits_in_no_row(length: int) -> None:
    with pytest.raises(ValueError, match=f"sample 1 has {length} tokens: must be from 1 to 12"):
        pack([1, length], 12)
