"""A problem with recomputation and offload as arrays of numbers, and what the annealing changes and finds.

With n chunks on each rank, streams are numbered kind * n + chunk, with the kinds F, B, W, C, O and R from 0. The passes
of a stream are numbered in micro-batch order, those of W by pieces. O and R aren't part of an order: `Orders.leads` say
which activations are offloaded and how early they come back, and from that and the limit follow the places.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_vshape.schedule.adaptive.layout import Floats, Ints

F, B, W, C, O, R = range(6)  # noqa: E741


# Files of machine code refer to these classes by name: renaming one makes older files unreadable.
class MemoryLayout(NamedTuple):
    """A problem in arrays, for W in `pieces`.

    F and B of a rank's stream take `durations` [rank, stream], W `weights` [rank, chunk], those of micro-batch i
    `scales[i]` times as long. What F and B give goes to `next_rank` and `next_stream`, where it arrives `delay` later;
    -1 is nowhere. `from_rank` and `from_stream` are the other way; -1 is the batch itself [rank, stream].

    An activation can be kept in several ways; way 0 recomputes nothing. With way w, C takes `again` [rank, chunk, w], F
    leaves `left`, of which an offload moves `moved`, in `offload` and `reload`. While F runs it takes `whole`
    [rank, chunk]; B leaves `kept`. `may_offload` is 0 or 1.
    """

    batch: int
    pieces: int
    may_offload: int
    durations: Floats
    weights: Floats
    scales: Floats
    next_rank: Ints
    next_stream: Ints
    delay: Floats
    from_rank: Ints
    from_stream: Ints
    limits: Floats
    whole: Floats
    kept: Floats
    again: Floats
    left: Floats
    moved: Floats
    offload: Floats
    reload: Floats


class Orders(NamedTuple):
    """Each rank's passes in order, and how each activation is kept.

    `streams` and `numbers` [rank, place] are passes, as many as `lengths` [rank]; `places` [rank, stream, number] says
    where each is, -1 for a C that there isn't. [rank, chunk, micro-batch]: `ways` of keeping; `leads`, 0 for what stays
    on the device, 1 where R comes right before C or B, 2 for a pass earlier, or as soon after as there is memory;
    `cuts`, in how many pieces W is, 0 where it runs with B. `shares` [rank, chunk, number] is how much of the
    W a piece is; a W in fewer pieces than the layout's starts with empty ones.
    """

    streams: Ints
    numbers: Ints
    lengths: Ints
    places: Ints
    ways: Ints
    leads: Ints
    cuts: Ints
    shares: Floats


class Steps(NamedTuple):
    """The passes of `Orders` with O and R between them [rank, step], as many as `counts` [rank].

    `at` [rank, stream, number] says which step each is; below 0 for what there isn't.
    """

    streams: Ints
    numbers: Ints
    counts: Ints
    at: Ints


class Timing(NamedTuple):
    """When steps start [rank, step], inputs of F and B arrive [rank, stream, number] and copies end [rank, chunk,
    number].

    `waited` [rank, step] says for what a step waited: for none or the step before (0), its input (1) or a copy (2).
    `queued` [rank, to the host or back, chunk, number] is the copy that a copy waited for, chunks x number + chunk; -1
    if for none. The ranks are done at `ends` [rank].
    """

    starts: Floats
    arrivals: Floats
    out_ends: Floats
    back_ends: Floats
    waited: Ints
    queued: Ints
    ends: Floats
