"""Candidates for many micro-batches, made of one for few by repeating its middle.

As without recomputation and offload (adaptive/extended.py): warm-up and cool-down stay, and micro-batches of the middle
come again and again, each kept as the one that it repeats. Passes go in the order in which they would then start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ds_vshape.schedule.adaptive.extended import periods_of
from ds_vshape.schedule.adaptive.layout import Floats, Ints
from ds_vshape.schedule.adaptive.memory.candidates import Candidate, Candidates
from ds_vshape.schedule.adaptive.memory.layout import B, C, F, Orders, W

# Where the middle may be, as shares of the micro-batches; and how many places are tried, the most regular first.
_FROM, _TO = 0.3, 0.75
_PLACES = 8


def lengthened(candidate: Candidate, fewer: Candidates, many: Candidates) -> Iterator[Candidate]:
    """`candidate`, one of `fewer`, for as many micro-batches as `many` are for."""
    layout, steps, timing = fewer.timed(candidate)
    chunks, batch, pieces = len(layout.whole[0]), layout.batch, layout.pieces
    more = many.problem.micro_batches - batch
    # When each pass starts [rank, stream, number]; what there isn't starts never.
    at = steps.at[:, :4 * chunks]
    starts = np.where(at >= 0, np.take_along_axis(timing.starts[:, None], np.maximum(at, 0), axis=2), np.inf)
    periods = periods_of(many.problem.placement)
    for middle, period, interval in _regular(starts[:, :2 * chunks, :batch], periods):
        number = np.arange(more)
        source = np.concatenate([np.arange(middle), middle - period + number % period, np.arange(middle, batch)])
        later = np.concatenate([np.zeros(middle), interval * (1 + number // period),
                                np.full(batch - middle, interval * more / period)])
        orders = _in_order(starts, source, later, candidate.orders, pieces)
        found = many.fitted(orders, pieces)
        if found is not None:
            yield found


def _regular(starts: Floats, periods: Iterable[int]) -> list[tuple[int, int, float]]:
    """(middle, period, interval): before which micro-batch so many are like those before them an interval earlier.

    `starts` [rank, stream, micro-batch] are those of F and B.
    """
    batch = starts.shape[2]
    found = []
    for period in periods:
        for middle in range(max(2 * period, round(_FROM * batch)), min(batch - period, round(_TO * batch)) + 1):
            apart = (starts[:, :, middle - period:middle + period] - starts[:, :, middle - 2 * period:middle])
            interval = float(np.median(apart))
            found.append((float(np.abs(apart - interval).mean()), interval / period, middle, period, interval))
    return [place[2:] for place in sorted(found)[:_PLACES]]


def _in_order(starts: Floats, source: Ints, later: Floats, few: Orders, pieces: int) -> Orders:
    """The orders in which micro-batch i goes as `source[i]` does in `few`, at `later[i]` after its `starts`."""
    ranks, chunks = few.ways.shape[:2]
    batch = len(source)
    of_pieces = (source[:, None] * pieces + np.arange(pieces)).ravel()
    targets = np.full((ranks, 4 * chunks, batch * pieces), np.inf)
    for kind in (F, B, W, C):
        rows = slice(kind * chunks, (kind + 1) * chunks)
        if kind == W:
            targets[:, rows] = starts[:, rows, of_pieces] + np.repeat(later, pieces)
        else:
            targets[:, rows, :batch] = starts[:, rows, source] + later
        if kind != C:
            _ascend(targets[:, rows])
    b, c = targets[:, B * chunks:W * chunks], targets[:, C * chunks:]
    c[...] = np.where(np.isfinite(c), np.minimum(c, b), np.inf)
    # What starts at the same time goes in this order.
    ranking = np.zeros(4, np.int64)
    ranking[[F, C, B, W]] = np.arange(4)
    lengths = np.isfinite(targets).sum(axis=(1, 2))
    most = chunks * batch * (3 + pieces)
    streams, numbers = (np.zeros((ranks, most), np.int64) for _ in range(2))
    places = np.full(targets.shape, -1)
    for rank, of_rank in enumerate(targets):
        stream, number = np.nonzero(np.isfinite(of_rank))
        order = np.lexsort((number, ranking[stream // chunks], of_rank[stream, number]))
        streams[rank, :len(order)], numbers[rank, :len(order)] = stream[order], number[order]
        places[rank, stream[order], number[order]] = np.arange(len(order))
    ways, leads, cuts = (np.ascontiguousarray(values[:, :, source]) for values in (few.ways, few.leads, few.cuts))
    return Orders(streams, numbers, lengths, places, ways, leads, cuts,
                  np.ascontiguousarray(few.shares[:, :, of_pieces]))


def _ascend(rows: Floats) -> None:
    """Put the starts that there are in each row in order: those of a stream go in micro-batch order."""
    for of_rank in rows:
        for row in of_rank:
            there = np.isfinite(row)
            row[there] = np.sort(row[there])
