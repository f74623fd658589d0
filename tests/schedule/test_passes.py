"""The notation of passes, and the placements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_vshape.schedule.passes import BW, B, C, F, Kind, O, Pass, R, W
from ds_vshape.schedule.placement import PLACEMENTS, interleaved, linear, v

numbers = st.integers(0, 10 ** 6)
passes = st.one_of(st.builds(Pass, st.sampled_from(Kind), numbers, numbers, st.just(0), st.just(1), st.just(0)),
                   st.builds(C, numbers, numbers, numbers))


@given(passes)
def test_notation_round_trips(action: Pass) -> None:
    assert Pass.parse(repr(action)) == action


def test_notation_is_readable() -> None:
    assert [repr(make(2, 15)) for make in (F, B, W, BW)] == ["F2.15", "B2.15", "W2.15", "BW2.15"]
    assert [repr(make(2, 15)) for make in (C, O, R)] == ["C2.15", "O2.15", "R2.15"]
    assert [repr(action) for action in (C(2, 15, 3), *W(2, 15).cut(2))] == ["C2.15[3]", "W2.15[0/2]", "W2.15[1/2]"]


@pytest.mark.parametrize("text", ["", "F", "F2", "F2.", "X2.5", "WB2.5", "F-1.0", "F2.5 ", " F2.5", "f2.5", "F2.5.1",
                                  "C2.5[0]", "C2.5[1/2]", "O2.5[1]", "F2.5[3]", "W2.5[1]"])
def test_what_is_no_pass_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="isn't a pass"):
        Pass.parse(text)


def test_kinds_know_what_they_give() -> None:
    assert [kind for kind in Kind if kind.gives_input_gradient] == [Kind.B, Kind.BW]
    assert [kind for kind in Kind if kind.gives_weight_gradients] == [Kind.W, Kind.BW]


def test_placements_as_drawn() -> None:
    assert linear(4).chunks == ((0,), (1,), (2,), (3,))
    assert v(4).chunks == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert interleaved(4).chunks == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_stage_has_one_rank_that_knows_it(name: str, ranks: int) -> None:
    placement = PLACEMENTS[name](ranks)
    assert (placement.name, placement.ranks) == (name, ranks)
    assert sorted(stage for chunks in placement.chunks for stage in chunks) == list(range(placement.stages))
    for rank, chunks in enumerate(placement.chunks):
        for place, stage in enumerate(chunks):
            assert (placement.rank_of(stage), placement.chunk_of(stage)) == (rank, place)
    assert placement.last_stage == placement.stages - 1
