"""Texts over a group of some ranks of the job: each arrives whole, in rank order, on those that should have it."""

from __future__ import annotations

from typing import Any

from ranks import run_ranks

from ds_vshape.comm.exchange import Exchange

TEXTS = {1: "è" * 5, 2: ""}


def exchange(rank: int) -> Any:
    some = Exchange([1, 2])
    if rank not in TEXTS:
        return None
    own = TEXTS[rank]
    # As os.listdir gives the name of a file in Latin-1.
    file = "caf\udce8"
    assert some.texts(file) == 2 * ["caf\\udce8"] and some.text_of_first(file) == "caf\\udce8"
    assert some.texts_on_first(file) == ([file, "caf\\udce8"] if rank == 1 else [])
    return some.texts(own), some.texts(""), some.text_of_first(own), some.texts_on_first(own or "xy")


def test_texts_over_a_part_of_the_job() -> None:
    outside, first, second = run_ranks(3, exchange)
    assert outside is None
    assert first == (["è" * 5, ""], ["", ""], "è" * 5, ["è" * 5, "xy"])
    assert second == (["è" * 5, ""], ["", ""], "è" * 5, [])
