"""The inner loop: change an order, or how an activation is kept, and time the batch again.

    copies    insert_copies: where O and R stand, so that a rank's limit is kept
    fitting   make_fit, keep_what_fits
    times     time_steps
    moves     _shift, _move_pass, set_way, _change_keeping
    anneal    _critical, anneal

O stands as late as memory allows, since it waits; R at its lead, or as soon after as memory allows. What is still there
when its R is due needs neither. machine_code.py says why all loops are in one file.
"""

from __future__ import annotations

from math import log

import numpy as np

from ds_vshape.schedule.adaptive.layout import Ints
from ds_vshape.schedule.adaptive.machine_code import jit
from ds_vshape.schedule.adaptive.memory.layout import B, C, F, MemoryLayout, O, Orders, R, Steps, Timing, W

_NEVER = float("inf")
_CLOSE = 1e-9
# How far a pass is moved, one of these by chance; for how many micro-batches in a row; on how many ranks either side.
_DISTANCES = np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 6, 6, 12])
_REPEATS = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 1 << 30])
_SPREADS = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1 << 30])
# The random numbers of a plan: a linear congruential generator modulo 2 ** 31, of which the upper bits are used.
_RANDOM_BITS = 0x7FFFFFFF
# Where the R of an activation would stand that is still there when it is due.
_STAYS = -2
# Kinds of entries of a critical path besides those of passes: a copy to the host, and one back.
_OUT, _BACK = 6, 7
# What a change does: R earlier, R later, offloaded or not, kept in another way.
_EARLIER, _LATER, _OFFLOADED, _WAY = range(4)


@jit
def _random(last: int) -> int:
    """The random number after `last`."""
    return (last * 1103515245 + 12345) & _RANDOM_BITS


@jit
def _user(orders: Orders, rank: int, chunk: int, number: int) -> int:
    """The place of the pass that needs an activation: C, or B without one."""
    chunks = orders.ways.shape[1]
    kind = C if orders.ways[rank, chunk, number] > 0 else B
    place: int = orders.places[rank, kind * chunks + chunk, number]
    return place


@jit
def insert_copies(layout: MemoryLayout, orders: Orders, steps: Steps, rank: int, queue: Ints, users: Ints) -> int:
    """Into `steps`: those of `rank`. The place of a pass that doesn't fit or comes before what it needs, -1 if none.

    `queue` and `users` [activation] are overwritten.
    """
    streams, numbers, places = orders.streams[rank], orders.numbers[rank], orders.places[rank]
    ways, leads, cuts = orders.ways[rank], orders.leads[rank], orders.cuts[rank]
    at, to_streams, to_numbers = steps.at[rank], steps.streams[rank], steps.numbers[rank]
    whole, kept = layout.whole[rank], layout.kept[rank]
    left, moved = layout.left[rank], layout.moved[rank]
    length, limit, pieces = orders.lengths[rank], layout.limits[rank], layout.pieces
    chunks = len(whole)
    for chunk in range(chunks):
        for number in range(layout.batch):
            at[O * chunks + chunk, number] = at[R * chunks + chunk, number] = -1
    all_users = 0
    for place in range(length):
        kind, chunk = streams[place] // chunks, streams[place] % chunks
        if kind == B or kind == C:
            number = numbers[place]
            if (ways[chunk, number] > 0) == (kind == C) and leads[chunk, number] > 0 and (
                    place >= places[chunk, number] + 2):
                users[all_users] = chunks * number + chunk
                all_users += 1
    alive = 0.0
    count = first = last = user = 0
    for place in range(length):
        stream, number = streams[place], numbers[place]
        kind, chunk = stream // chunks, stream % chunks
        # Reloads that are due.
        while user < all_users:
            which, batch = users[user] % chunks, users[user] // chunks
            needed = places[(C if ways[which, batch] > 0 else B) * chunks + which, batch]
            if place < max(needed - leads[which, batch] + 1, places[which, batch] + 2):
                break
            size = moved[which, ways[which, batch]]
            if at[O * chunks + which, batch] < 0:
                at[R * chunks + which, batch] = _STAYS
                user += 1
                continue
            while first < last and alive + size > limit:
                which_out, out = queue[first] % chunks, queue[first] // chunks
                if at[R * chunks + which_out, out] != _STAYS:
                    to_streams[count], to_numbers[count] = O * chunks + which_out, out
                    at[O * chunks + which_out, out] = count
                    alive -= moved[which_out, ways[which_out, out]]
                    count += 1
                first += 1
            if alive + size > limit:
                if place == needed:
                    return place
                break
            to_streams[count], to_numbers[count] = R * chunks + which, batch
            at[R * chunks + which, batch] = count
            count += 1
            alive += size
            user += 1
        before = after = 0.0
        if kind == F:
            before = whole[chunk]
            after = left[chunk, ways[chunk, number]] - before
        elif kind == B:
            if places[chunk, number] > place or (
                    ways[chunk, number] > 0 and places[C * chunks + chunk, number] > place):
                return place
            after = -whole[chunk]
            if cuts[chunk, number] > 0:
                after += kept[chunk]
        elif kind == W:
            if places[B * chunks + chunk, number // pieces] > place:
                return place
            if number % pieces == pieces - 1:
                after = -kept[chunk]
        else:
            if places[chunk, number] > place:
                return place
            before = whole[chunk] - left[chunk, ways[chunk, number]]
        need = max(before, before + after)
        while alive + need > limit:
            if first == last:
                return place
            which, batch = queue[first] % chunks, queue[first] // chunks
            if at[R * chunks + which, batch] != _STAYS:
                to_streams[count], to_numbers[count] = O * chunks + which, batch
                at[O * chunks + which, batch] = count
                alive -= moved[which, ways[which, batch]]
                count += 1
            first += 1
        to_streams[count], to_numbers[count] = stream, number
        at[stream, number] = count
        count += 1
        alive += before + after
        if kind == F and leads[chunk, number] > 0 and (
                places[(C if ways[chunk, number] > 0 else B) * chunks + chunk, number] >= place + 2):
            queue[last] = chunks * number + chunk
            last += 1
    steps.counts[rank] = count
    return -1


@jit
def make_fit(layout: MemoryLayout, orders: Orders, steps: Steps, rank: int, queue: Ints, users: Ints) -> bool:
    """Change the order of `rank` until the limit can be kept; False, and half done, if this knows no way to.

    Where a pass doesn't fit, a pending W comes before it; without one, what is reloading comes back later; and without
    that, the next B and its C come before it.
    """
    chunks = orders.ways.shape[1]
    streams, places = orders.streams, orders.places
    for _ in range(8 * orders.lengths[rank]):
        bad = insert_copies(layout, orders, steps, rank, queue, users)
        if bad < 0:
            return True
        found = -1
        for place in range(bad + 1, orders.lengths[rank]):
            stream, number = streams[rank, place], orders.numbers[rank, place]
            if stream // chunks == W and places[rank, stream - chunks, number // layout.pieces] < bad:
                found = place
                break
        if found >= 0:
            if not _shift(orders, rank, found, bad):
                return False
            continue
        latest = found_chunk = found_number = -1
        for chunk in range(chunks):
            for number in range(layout.batch):
                lead = orders.leads[rank, chunk, number]
                if lead > 1:
                    user = _user(orders, rank, chunk, number)
                    if user - lead < bad < user and user > latest and places[rank, chunk, number] < bad:
                        latest, found_chunk, found_number = user, chunk, number
        if latest >= 0:
            orders.leads[rank, found_chunk, found_number] = latest - bad
            continue
        for place in range(bad + 1, orders.lengths[rank]):
            stream, number = streams[rank, place], orders.numbers[rank, place]
            if stream // chunks == B and places[rank, stream % chunks, number] < bad:
                found = place
                break
        if found < 0:
            return False
        stream, number = streams[rank, found], orders.numbers[rank, found]
        to = bad
        again = places[rank, C * chunks + stream % chunks, number]
        if again > bad:
            if not _shift(orders, rank, again, to):
                return False
            to += 1
        elif again == bad:
            to += 1
        if not _shift(orders, rank, places[rank, stream, number], to):
            return False
    return False


@jit
def keep_what_fits(layout: MemoryLayout, orders: Orders, steps: Steps, rank: int, queue: Ints, users: Ints,
                   which: Ints) -> None:
    """Of `which` activations of `rank` (chunks x number + chunk), in this order, keep those that fit on the device, and
    recompute none that needn't be."""
    chunks = orders.ways.shape[1]
    for activation in which:
        chunk, number = activation % chunks, activation // chunks
        way, lead = orders.ways[rank, chunk, number], orders.leads[rank, chunk, number]
        orders.leads[rank, chunk, number] = 0
        if way > 0:
            set_way(orders, rank, chunk, number, 0)
        if insert_copies(layout, orders, steps, rank, queue, users) < 0:
            continue
        orders.leads[rank, chunk, number] = lead
        if way > 0:
            if lead > 0 and insert_copies(layout, orders, steps, rank, queue, users) < 0:
                continue
            set_way(orders, rank, chunk, number, way)


@jit
def time_steps(layout: MemoryLayout, orders: Orders, steps: Steps, timing: Timing, cutoff: float) -> float:
    """Into `timing`: each step as early as can be. The makespan; infinite if ranks wait for each other, or above
    `cutoff`."""
    # Fields in variables: each use of one in the loop would count references.
    all_streams, all_numbers, counts, at_steps = steps.streams, steps.numbers, steps.counts, steps.at
    arrivals, out_ends, back_ends, starts = timing.arrivals, timing.out_ends, timing.back_ends, timing.starts
    all_waited, queued, ways, cuts, shares = timing.waited, timing.queued, orders.ways, orders.cuts, orders.shares
    durations, weights, again, scales = layout.durations, layout.weights, layout.again, layout.scales
    from_rank, next_rank, next_stream, delay = layout.from_rank, layout.next_rank, layout.next_stream, layout.delay
    offload, reload, pieces = layout.offload, layout.reload, layout.pieces
    ranks, chunks = len(counts), weights.shape[1]
    sent = np.zeros((ranks, 2 * chunks), np.int64)
    at = np.zeros(ranks, np.int64)
    free, out_free, back_free = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    out_last, back_last = np.full(ranks, -1), np.full(ranks, -1)
    left = 0
    for rank in range(ranks):
        left += counts[rank]
    rank, direction, idle = 0, 1, 0
    while left > 0:
        step, now = at[rank], free[rank]
        began = step
        while step < counts[rank]:
            stream, number = all_streams[rank, step], all_numbers[rank, step]
            kind, chunk = stream // chunks, stream % chunks
            waited = 0
            if kind <= B:
                if from_rank[rank, stream] >= 0:
                    if number >= sent[rank, stream]:
                        break
                    if arrivals[rank, stream, number] > now:
                        now, waited = arrivals[rank, stream, number], 1
                if kind == B and at_steps[rank, R * chunks + chunk, number] >= 0 and ways[rank, chunk, number] == 0:
                    if back_ends[rank, chunk, number] > now:
                        now, waited = back_ends[rank, chunk, number], 2
                starts[rank, step], all_waited[rank, step] = now, waited
                now += durations[rank, stream] * scales[number]
                if kind == B and cuts[rank, chunk, number] == 0:
                    now += weights[rank, chunk] * scales[number]
                if next_rank[rank, stream] >= 0:
                    target, to = next_rank[rank, stream], next_stream[rank, stream]
                    arrivals[target, to, number] = now + delay[rank, stream]
                    sent[target, to] = number + 1
                if kind == F and at_steps[rank, O * chunks + chunk, number] >= 0:
                    queued[rank, 0, chunk, number] = out_last[rank] if out_free[rank] > now else -1
                    out_free[rank] = max(out_free[rank], now) + (
                        offload[rank, chunk, ways[rank, chunk, number]] * scales[number])
                    out_ends[rank, chunk, number] = out_free[rank]
                    out_last[rank] = chunks * number + chunk
            elif kind == W:
                starts[rank, step], all_waited[rank, step] = now, 0
                now += weights[rank, chunk] * shares[rank, chunk, number] * scales[number // pieces]
            elif kind == C:
                if at_steps[rank, R * chunks + chunk, number] >= 0 and back_ends[rank, chunk, number] > now:
                    now, waited = back_ends[rank, chunk, number], 2
                starts[rank, step], all_waited[rank, step] = now, waited
                now += again[rank, chunk, ways[rank, chunk, number]] * scales[number]
            elif kind == O:
                if out_ends[rank, chunk, number] > now:
                    now, waited = out_ends[rank, chunk, number], 2
                starts[rank, step], all_waited[rank, step] = now, waited
            else:
                starts[rank, step], all_waited[rank, step] = now, 0
                queued[rank, 1, chunk, number] = back_last[rank] if back_free[rank] > now else -1
                back_free[rank] = max(back_free[rank], now) + (
                    reload[rank, chunk, ways[rank, chunk, number]] * scales[number])
                back_ends[rank, chunk, number] = back_free[rank]
                back_last[rank] = chunks * number + chunk
            step += 1
        if step == began:
            idle += 1
            if idle > 2 * ranks:
                return _NEVER
        else:
            idle = 0
            left -= step - began
            at[rank], free[rank] = step, now
            if now > cutoff:
                return _NEVER
        # Back and forth over the ranks, as micro-batches do.
        rank += direction
        if rank == ranks or rank < 0:
            direction = -direction
            rank += direction
    makespan = 0.0
    for rank in range(ranks):
        timing.ends[rank] = free[rank]
        makespan = max(makespan, free[rank])
    return makespan


@jit
def _critical(layout: MemoryLayout, steps: Steps, timing: Timing, path: Ints) -> int:
    """Into `path`: what delays the batch's end if it is delayed: [rank, kind, number]. How many they are."""
    rank = 0
    for other in range(len(timing.ends)):
        if timing.ends[other] > timing.ends[rank]:
            rank = other
    chunks = layout.weights.shape[1]
    step, length = steps.counts[rank] - 1, 0
    while step >= 0:
        stream, number = steps.streams[rank, step], steps.numbers[rank, step]
        kind, chunk = stream // chunks, stream % chunks
        waited = timing.waited[rank, step]
        if kind <= C or waited > 0:
            path[length, 0], path[length, 1], path[length, 2] = rank, stream, number
            length += 1
        if waited == 0:
            if timing.starts[rank, step] <= _CLOSE:
                break
            step -= 1
        elif waited == 1:
            source, from_stream = layout.from_rank[rank, stream], layout.from_stream[rank, stream]
            rank, step = source, steps.at[source, from_stream, number]
        else:
            out = kind == O
            while True:
                path[length, 0], path[length, 2] = rank, number
                path[length, 1] = (_OUT if out else _BACK) * chunks + chunk
                length += 1
                before = timing.queued[rank, 0 if out else 1, chunk, number]
                if before < 0:
                    break
                chunk, number = before % chunks, before // chunks
            step = steps.at[rank, chunk if out else R * chunks + chunk, number]
            if not out:
                path[length, 0], path[length, 1], path[length, 2] = rank, R * chunks + chunk, number
                length += 1
                step -= 1
    return length


@jit
def _shift(orders: Orders, rank: int, place: int, to: int) -> bool:
    """Move the pass at `place` to `to`; False, and half done, if it would pass one of its own stream."""
    stream, number = orders.streams[rank, place], orders.numbers[rank, place]
    step = 1 if to > place else -1
    for here in range(place, to, step):
        other, which = orders.streams[rank, here + step], orders.numbers[rank, here + step]
        if other == stream:
            return False
        orders.streams[rank, here], orders.numbers[rank, here] = other, which
        orders.places[rank, other, which] = here
    orders.streams[rank, to], orders.numbers[rank, to] = stream, number
    orders.places[rank, stream, number] = to
    return True


@jit
def _move_pass(layout: MemoryLayout, orders: Orders, rank: int, stream: int, number: int, past: int, other: int,
               distance: int, repeats: int) -> bool:
    """Move a pass past another, which is `distance` away elsewhere, and as many following ones past their neighbours.

    False, and half done, if the first can't be.
    """
    chunks = orders.ways.shape[1]
    step = layout.pieces if stream // chunks == W else 1
    other_step = layout.pieces if past // chunks == W else 1
    for repeat in range(repeats):
        mine, others = number + repeat * step, other + repeat * other_step
        if mine >= layout.batch * step or others >= layout.batch * other_step:
            break
        place, to = orders.places[rank, stream, mine], orders.places[rank, past, others]
        # At the ramps, and on other ranks, the two may stand otherwise.
        if place < 0 or to < 0 or (to > place) != (distance > 0) or abs(to - place) > 2 * abs(distance):
            if repeat == 0:
                return False
            continue
        if not _shift(orders, rank, place, to):
            return False
    return True


@jit
def set_way(orders: Orders, rank: int, chunk: int, number: int, way: int) -> None:
    """Keep an activation in another way; a new C comes right before its B."""
    chunks = orders.ways.shape[1]
    old, stream = orders.ways[rank, chunk, number], C * chunks + chunk
    orders.ways[rank, chunk, number] = way
    length = orders.lengths[rank]
    if old == 0 and way > 0:
        place = orders.places[rank, B * chunks + chunk, number]
        for here in range(length, place, -1):
            other, which = orders.streams[rank, here - 1], orders.numbers[rank, here - 1]
            orders.streams[rank, here], orders.numbers[rank, here] = other, which
            orders.places[rank, other, which] = here
        orders.streams[rank, place], orders.numbers[rank, place] = stream, number
        orders.places[rank, stream, number] = place
        orders.lengths[rank] = length + 1
    elif old > 0 and way == 0:
        place = orders.places[rank, stream, number]
        for here in range(place, length - 1):
            other, which = orders.streams[rank, here + 1], orders.numbers[rank, here + 1]
            orders.streams[rank, here], orders.numbers[rank, here] = other, which
            orders.places[rank, other, which] = here
        orders.places[rank, stream, number] = -1
        orders.lengths[rank] = length - 1


@jit
def _change_keeping(layout: MemoryLayout, orders: Orders, rank: int, chunk: int, number: int, repeats: int, stride: int,
                    change: int, amount: int) -> None:
    """Change how some activations are kept, `stride` micro-batches apart."""
    ways = layout.again.shape[2]
    new_lead = 0 if orders.leads[rank, chunk, number] > 0 else 2 + amount
    new_way = 0
    if orders.ways[rank, chunk, number] == 0 or (ways > 2 and amount % 2 == 0):
        new_way = 1 + amount % max(1, ways - 1)
    for repeat in range(repeats):
        which = number + repeat * stride
        if which >= layout.batch:
            break
        lead = orders.leads[rank, chunk, which]
        if change == _EARLIER and lead > 0:
            orders.leads[rank, chunk, which] = lead + 1 + amount // 2
        elif change == _LATER and lead > 1:
            orders.leads[rank, chunk, which] = max(1, lead - 1 - amount // 2)
        elif change == _OFFLOADED:
            orders.leads[rank, chunk, which] = new_lead
            if new_lead > 0 and orders.ways[rank, chunk, which] > 0 and amount < 3:
                set_way(orders, rank, chunk, which, 0)
        elif change == _WAY:
            set_way(orders, rank, chunk, which, new_way)


@jit
def _copy_rank(source: Orders, target: Orders, rank: int) -> None:
    streams, numbers, places = source.streams[rank], source.numbers[rank], source.places[rank]
    ways, leads = source.ways[rank], source.leads[rank]
    to_streams, to_numbers, to_places = target.streams[rank], target.numbers[rank], target.places[rank]
    to_ways, to_leads = target.ways[rank], target.leads[rank]
    length = source.lengths[rank]
    for place in range(length):
        to_streams[place], to_numbers[place] = streams[place], numbers[place]
    target.lengths[rank] = length
    for stream in range(places.shape[0]):
        for number in range(places.shape[1]):
            to_places[stream, number] = places[stream, number]
    for chunk in range(ways.shape[0]):
        for number in range(ways.shape[1]):
            to_ways[chunk, number], to_leads[chunk, number] = ways[chunk, number], leads[chunk, number]


@jit
def _copy_steps(source: Steps, target: Steps, rank: int) -> None:
    streams, numbers, at = source.streams[rank], source.numbers[rank], source.at[rank]
    to_streams, to_numbers, to_at = target.streams[rank], target.numbers[rank], target.at[rank]
    count = source.counts[rank]
    for step in range(count):
        to_streams[step], to_numbers[step] = streams[step], numbers[step]
    target.counts[rank] = count
    for stream in range(at.shape[0]):
        for number in range(at.shape[1]):
            to_at[stream, number] = at[stream, number]


@jit
def copy_orders(source: Orders, target: Orders) -> None:
    """All of `source` into `target`."""
    for rank in range(len(source.lengths)):
        _copy_rank(source, target, rank)


@jit
def empty_steps(orders: Orders) -> Steps:
    """Room for the steps of `orders`."""
    ranks, most = orders.streams.shape
    most += 2 * orders.ways.shape[1] * orders.ways.shape[2]
    return Steps(np.zeros((ranks, most), np.int64), np.zeros((ranks, most), np.int64), np.zeros(ranks, np.int64),
                 np.full((ranks, 6 * orders.ways.shape[1], orders.places.shape[2]), -1))


@jit
def empty_timing(steps: Steps) -> Timing:
    """Room for the times of `steps`."""
    ranks, most = steps.streams.shape
    chunks, numbers = steps.at.shape[1] // 6, steps.at.shape[2]
    return Timing(np.zeros((ranks, most)), np.zeros((ranks, 2 * chunks, numbers)), np.zeros((ranks, chunks, numbers)),
                  np.zeros((ranks, chunks, numbers)), np.zeros((ranks, most), np.int64),
                  np.full((ranks, 2, chunks, numbers), -1), np.zeros(ranks))


@jit
def anneal(layout: MemoryLayout, orders: Orders, best_orders: Orders, best: float, tries: int, temperature: float,
           goal: float, seed: int) -> float:
    """Change `orders` by `tries` moves; the makespan of the best, which `best_orders` are then.

    So far that is `best`. Each try changes something on a critical path: a pass moves, or an activation is kept in
    another way, alone or for several micro-batches in a row, on its rank or on those beside it as well. An order that
    is longer by d is taken with the chance exp(-d / temperature). Ends early at `goal`.
    """
    ranks, chunks, ways = layout.again.shape
    queue, users = np.zeros(chunks * layout.batch, np.int64), np.zeros(chunks * layout.batch, np.int64)
    trial = Orders(orders.streams.copy(), orders.numbers.copy(), orders.lengths.copy(), orders.places.copy(),
                   orders.ways.copy(), orders.leads.copy(), orders.cuts, orders.shares)
    steps, trial_steps = empty_steps(orders), empty_steps(orders)
    for rank in range(ranks):
        if insert_copies(layout, orders, steps, rank, queue, users) >= 0:
            return best
        _copy_steps(steps, trial_steps, rank)
    timing, spare = empty_timing(steps), empty_timing(steps)
    makespan = time_steps(layout, orders, steps, timing, _NEVER)
    if makespan == _NEVER:
        return best
    path = np.zeros((3 * ranks * steps.streams.shape[1], 3), np.int64)
    changed = np.zeros(ranks, np.int64)
    on_path = _critical(layout, steps, timing, path)
    chance = seed
    for _ in range(tries):
        if best <= goal * (1 + _CLOSE):
            break
        chance = _random(chance)
        entry = (chance >> 8) % on_path
        rank, stream, number = path[entry, 0], path[entry, 1], path[entry, 2]
        chance = _random(chance)
        distance = _DISTANCES[(chance >> 10) % 16] * (1 if (chance >> 16) % 2 == 0 else -1)
        choice = (chance >> 18) % 16
        chance = _random(chance)
        repeats = min(layout.batch, _REPEATS[(chance >> 12) % 16])
        spread = min(ranks, _SPREADS[(chance >> 18) % 16])
        chance = _random(chance)
        amount, nearby, stride = (chance >> 8) % 4, (chance >> 12) % 8 - 4, 1 + (chance >> 16) % 8 // 5
        chance = _random(chance)
        change, any_chunk = (chance >> 12) % 4, (chance >> 18) % chunks
        if stream // chunks == O and choice < 6:
            # The pass that needed the memory for which O waited.
            step = steps.at[rank, stream, number]
            while step < steps.counts[rank] - 1 and steps.streams[rank, step] // chunks >= O:
                step += 1
            stream, number = steps.streams[rank, step], steps.numbers[rank, step]
        if layout.may_offload == 0:
            change = _WAY
        elif ways == 1:
            change = change % _WAY
        is_move = stream // chunks <= C and (choice < 12 or (layout.may_offload == 0 and ways == 1))
        if stream // chunks == C and choice >= 6:
            # Not to be recomputed takes less time, and the copy instead may take none.
            is_move, change = False, _OFFLOADED if layout.may_offload == 1 and choice < 11 else _WAY
        past = other = chunk = 0
        if is_move:
            to = orders.places[rank, stream, number] + distance
            if not 0 <= to < orders.lengths[rank]:
                continue
            past, other = orders.streams[rank, to], orders.numbers[rank, to]
            if past == stream:
                continue
        else:
            chunk = stream % chunks
            if stream // chunks == W:
                number = number // layout.pieces
            if stream // chunks < C or stream // chunks == O or (stream // chunks > O and choice >= 8):
                # Any activation nearby.
                chunk, number = any_chunk, min(layout.batch - 1, max(0, number + nearby))
        for each in range(ranks):
            changed[each] = 0
        fine = True
        for turn in range(2 * spread + 1):
            # The rank itself first, then those below it, then those above.
            each = rank - turn if turn <= spread else rank + turn - spread
            if not 0 <= each < ranks:
                continue
            changed[each] = 1
            if is_move:
                fits = _move_pass(layout, trial, each, stream, number, past, other, distance, repeats)
            else:
                fits = True
                _change_keeping(layout, trial, each, chunk, number, repeats, stride, change, amount)
            if fits:
                fits = insert_copies(layout, trial, trial_steps, each, queue, users) < 0
            if not fits:
                _copy_rank(orders, trial, each)
                _copy_steps(steps, trial_steps, each)
                changed[each] = 0
                if each == rank:
                    fine = False
                    break
        if not fine:
            continue
        chance = _random(chance)
        cutoff = makespan - temperature * log(((chance >> 8) + 1) / 2 ** 23)
        found = time_steps(layout, trial, trial_steps, spare, cutoff)
        if found > cutoff:
            for each in range(ranks):
                if changed[each] == 1:
                    _copy_rank(orders, trial, each)
                    _copy_steps(steps, trial_steps, each)
            continue
        makespan = found
        for each in range(ranks):
            if changed[each] == 1:
                _copy_rank(trial, orders, each)
                _copy_steps(trial_steps, steps, each)
        timing, spare = spare, timing
        on_path = _critical(layout, steps, timing, path)
        if makespan < best - _CLOSE:
            best = makespan
            copy_orders(orders, best_orders)
    return best
