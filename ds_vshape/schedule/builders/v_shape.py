"""Schedules of the V placement: rank i holds stages i and 2p-1-i, a long-lived and a short-lived one (or c of them).

Every rank then keeps about the same, and the offsets of the building block set how much (paper, section 3.3 and
Tables 1, 8, 9). A block here is its four steps (between neighbouring ranks: F down, F back up, B down, B back up) and
its three turns (F at the last rank, from F to B at rank 0, B at the last rank). Unit times, T = 6, M = 1F1B's peak:

    schedule   steps     turns                     peak, in micro-batches   of M   bubble of one batch
    v-min      1 1 1 1   1 3 1, 1 1 1 or 1 5 1     (p + 4) // 3             1/3    2/3 of 1F1B's
                         (p % 3 = 0, 1 or 2)
    v-half     2 1 2 1   2 4 1 or 1 1 2            (p + 2) // 2             1/2    1/2 of 1F1B's
                         (p even or odd)
    v-zb       4 2 4 2   3 1 3                     p                        1      0 within a rank's own span
    1f1b-v     1 1 3 3   3 1 3, 1 2 3 or 1 3 3     ((4p + 4) // 3) / 2      2/3    1F1B's
                         (p % 3 = 0, 1 or 2)

The paper turns with 1 1 1 in v-min at p % 3 = 2 and with 2 1 1 in v-half at odd p. At the same peak the turns above
save up to 4 and 3 units there, and with them both meet the lower bound of `bounds.py` from m = p on.

With four chunks on a rank the block goes down and up twice, and T = 12. Steps of 3 on average keep p micro-batches as
with two; the turns are the shortest at which no passes meet and nothing but the p - 1 units of the ramp is idle. With
more than four they are found one after another, and with few micro-batches some units more are idle.

`1f1b-v` runs whole backwards, which overlap in its block; repeating and squeezing part them. `zb-v` is the hand-made
schedule of "Zero Bubble Pipeline Parallelism" (section 6), with v-zb's peak and bubble from counting passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.builders.building_block import BuildingBlock, reorder, repeat
from ds_vshape.schedule.passes import B, F, Pass, W
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.schedule import Order, Schedule


def v_block(ranks: int, steps: Sequence[int], turns: Sequence[int]) -> BuildingBlock:
    """The block of `steps` and of the `turns` between them (module docstring), with whole backwards."""
    chunks = len(steps) // 2
    offsets = [offset for step, turn in zip(steps, (*turns, None), strict=True)
               for offset in (*[step] * (ranks - 1), turn) if offset is not None]
    return BuildingBlock.from_offsets(v(ranks, chunks), 3 * chunks, offsets)


def one_f_one_b_v(ranks: int, micro_batches: int) -> Schedule:
    """Two thirds of 1F1B's activations in about its time, with whole backwards."""
    turns = ((3, 1, 3), (1, 2, 3), (1, 3, 3))[ranks % 3]
    return reorder(repeat(v_block(ranks, (1, 1, 3, 3), turns), micro_batches, "1f1b-v"), (4 * ranks + 4) // 3)


def v_min(ranks: int, micro_batches: int) -> Schedule:
    """A third of 1F1B's activations; a bubble in every interval where F, B and W differ."""
    turns = ((1, 3, 1), (1, 1, 1), (1, 5, 1))[ranks % 3]
    block = v_block(ranks, (1, 1, 1, 1), turns).split()
    return reorder(repeat(block, micro_batches, "v-min"), 2 * ((ranks + 4) // 3))


def v_half(ranks: int, micro_batches: int) -> Schedule:
    """Half of 1F1B's activations; no bubble between warm-up and cool-down while F, B and W are about alike."""
    turns = ((2, 4, 1), (1, 1, 2))[ranks % 2]
    block = v_block(ranks, (2, 1, 2, 1), turns).split()
    return reorder(repeat(block, micro_batches, "v-half"), 2 * ((ranks + 2) // 2))


def v_zb(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """1F1B's activations and no bubble within a rank's own span: F B W of one chunk, then of another."""
    known = {2: (3, 1, 3), 4: ((1, 1, 2, 1, 2, 1, 1), (1, 2, 2, 1, 2, 2, 1))[ranks % 2]}
    turns = known[chunks] if chunks in known else _turns(ranks, (4, 2) * chunks)
    if turns is None:
        raise ValueError(f"no turns of v-zb on {ranks} ranks with {chunks} stages each")
    block = v_block(ranks, (4, 2) * chunks, turns).split()
    return reorder(repeat(block, micro_batches, "v-zb"), chunks * ranks)


def of_steps(ranks: int, micro_batches: int, chunks: int, down: int, up: int) -> Schedule | None:
    """The schedule with the steps `down` and `up` on all ways; None where no turns part its passes.

    The longer the steps, the more memory: that of 4 and 2 is v-zb's, that of 3 and 1 about 0.7 of it.
    """
    turns = _turns(ranks, (down, up) * chunks)
    if turns is None:
        return None
    repeated = repeat(v_block(ranks, (down, up) * chunks, turns).split(), micro_batches, f"v {down} {up}")
    # Peaks count a chunk as 2 / chunks.
    return reorder(repeated, round(max(peak_activations(repeated)) * chunks / 2))


# How many ways are tried before there are said to be no turns.
_MOST_WAYS = 2000


def _turns(ranks: int, steps: Sequence[int]) -> Sequence[int] | None:
    """Turns at which no passes meet, each as short as those before it let it be; None if there are none."""
    interval = 3 * len(steps) // 2
    found: list[int] = []
    taken: set[tuple[int, int]] = set()
    tried = 0

    def go_on(start: int) -> bool:
        nonlocal tried
        if len(found) == len(steps):
            return True
        step, way = steps[len(found)], reversed(range(ranks)) if len(found) % 2 else range(ranks)
        places = list(enumerate(way))
        # The first way needs no turn.
        for turn in range(1, interval) if found else (0,):
            passes = {(rank, (start + turn + step * place) % interval) for place, rank in places}
            tried += 1
            if tried > _MOST_WAYS:
                return False
            if taken.isdisjoint(passes):
                found.append(turn)
                taken.update(passes)
                if go_on(start + turn + step * (ranks - 1)):
                    return True
                found.pop()
                taken.difference_update(passes)
        return False

    return found[1:] if go_on(0) else None


def zb_v(ranks: int, micro_batches: int) -> Schedule:
    """1F1B's activations and no bubble within a rank's own span, by hand.

    Rank r, with a = stage r and b = stage 2p-1-r; the counts let every pass find its input there:

        Fa              2 (p - r) - 1 times     the first micro-batch goes down and comes back up
        Fb Fa           r times                 room for 2p activations is filled
        Fb Bb Wb        p - r times             the first input gradients come down
        Fa Ba Wa Fb Bb Wb                       m - p times; Fa while there are any
        Bb Ba           r times, W held back    the last input gradients hurry up
        Ba Wa           p - r times
        Wb Wa                                   what is left
    """
    # With fewer micro-batches the counts don't fit: make them fit, and drop what was filled in.
    filled = max(micro_batches, 2 * ranks - 1)
    orders = tuple(tuple(action for action in _zb_v_order(rank, ranks, filled) if action.micro_batch < micro_batches)
                   for rank in range(ranks))
    return reorder(Schedule("zb-v", v(ranks), micro_batches, orders), 2 * ranks)


def _zb_v_order(rank: int, ranks: int, micro_batches: int) -> Order:
    """Rank `rank`'s order for at least 2p - 1 micro-batches; the lines follow those of `zb_v`."""
    batch, a, b = range(micro_batches), rank, 2 * ranks - 1 - rank
    fa, ba, wa = (iter([kind(a, i) for i in batch]) for kind in (F, B, W))
    fb, bb, wb = (iter([kind(b, i) for i in batch]) for kind in (F, B, W))
    order: list[Pass] = []

    def add(times: int, *streams: Iterator[Pass]) -> None:
        for _ in range(times):
            for stream in streams:
                order.extend(islice(stream, 1))

    add(2 * (ranks - rank) - 1, fa)
    add(rank, fb, fa)
    add(ranks - rank, fb, bb, wb)
    add(micro_batches - ranks, fa, ba, wa, fb, bb, wb)
    add(rank, bb, ba)
    add(ranks - rank, ba, wa)
    add(micro_batches, wb, wa)
    return tuple(order)
