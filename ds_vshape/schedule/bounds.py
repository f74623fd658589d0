"""How fast any schedule could be: a proven lower bound on the time of a batch.

The bound holds for every order on a placement that stays within a rank's limit of memory, with the backward split or
whole (a whole backward is a split one that sends its input gradient late). It is the greater of two, for the rank that
needs most, with all its stages or with one of them alone: before a heavy head starts, its rank has hardly anything to
do. The first adds to the rank's work the time that the rank must idle at both ends of the batch:

    time 0                  h                                    s              makespan
    |-- before: F only -----|---------- anything ----------------|-- after ------|

    before   No B can start on the rank before h, when the first micro-batch has gone up to the last stage and come
             back down. Until then the rank runs forwards alone, of which only so many fit into its memory: it idles h
             less their time or more. Nor can it start before its first F can.
    after F  Let s be the start of the rank's last F. That micro-batch still has to reach the last stage and come all
             the way back to W of stage 0: the batch ends `tail` later or after. In this time the rank has that F to do,
             and B and W of what it keeps at s: it idles tail less the most that this can be.
    after B  The same from the start of the rank's last B, when of what it keeps only W is left beside that B.

`before` and `after B` don't overlap, since s >= h for a B. `before` and `after F` overlap only if all the rank's
forwards start before its first B can; then it keeps them all, so they all fit, and the greater of the two idle times
counts instead of their sum.

What fits: forwards by their whole sizes. At s of `after F` every micro-batch of a stage is either before its B (whole
size, B and W to do) or behind it (what B left, and W to do in proportion, since pieces of W give back shares); so the
work is at most that of some numbers of the former, and for the memory left beside them the greatest W per memory. With
one unit of memory for each activation and room for k that is k F, F + k (B + W) and B + k W: with unit times on the V
placement the last rank gives the paper's 6 n + 6 p - 3 k - 1 ("Pipeline Parallelism with Controllable Memory",
appendix), which needs k < 2 n.

The second, which counts where memory is short, asks for how long memory is taken. An activation lies there whole from
the start of its F, goes up to the last stage and comes back, to the end of its B, and half of W's time at least while W
gives it back (a BW keeps all of it). What is only kept for a W to come doesn't count. So from the rank's first F to its
last B, a time t, the sum of memory x time of all micro-batches fits under the limit L, but for Ws after that B: these
have L at most to give back, in W's time each.

    L |     _______________
      |   .'               '.             sum - L W <= L t - (L - u)^2 / 2 (1 / rise + 1 / fall)
    u | .'                   '.
      |'-----------------------'
      0                        t

u is the largest single size. Passes run one after another, so x after the first F began there is no more than u + rise
x, where `rise` is the most memory that an F takes per second of its own, and x before the last B ends no more than
u + fall x, for Bs. The two slopes don't meet if all Fs and Bs take longer than both slopes; else they aren't counted.
The first F can't start before its input is there, and the last B's gradient must go down to stage 0 after t.

Where recomputation or offload is allowed, more forwards than fit may run before the first B, and what is kept isn't
whole all the time. Then the bound is the greatest of: the rank's work, C included, with what it idles after its last B;
its Bs and Ws after the first B can start; each engine's copies, with the way to the first and from the last of them;
and memory x time with what is alive at least. Which micro-batches are recomputed or offloaded is left open
(memory_on_demand.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor, inf
from typing import NamedTuple

import numpy as np

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.memory_on_demand import least_of_mixtures, options
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times

_SLACK = 1e-9


def lower_bound(placement: Placement, micro_batches: int, times: Times, peak: float, kinds: Collection[Kind] = ()
                ) -> float:
    """The least makespan of `micro_batches` on `placement` if no rank keeps more than `peak` activations.

    `peak` counts activations of 1/(2p) of the model, as `activations.peak_activations` does; it must hold one stage's.
    `kinds` as in `lower_bound_of_limits`.
    """
    size = 2 * placement.ranks / placement.stages
    kept = floor(peak / size + _SLACK)
    if kept < 1:
        raise ValueError(f"a peak of {peak:g} can't hold the activations of one stage")
    return lower_bound_of_limits(placement, micro_batches, times, Activations.counted(placement),
                                 (kept * size,) * placement.ranks, kinds)


def lower_bound_of_limits(placement: Placement, micro_batches: int, times: Times, activations: Activations,
                          limits: Sequence[float], kinds: Collection[Kind] = ()) -> float:
    """The least makespan if rank r never keeps more than `limits[r]`, by `activations.peak_activations`.

    A schedule may have passes of `kinds`: C, O (with its R), both or none of them.

    Where micro-batches take different times, three bounds are known: that of a batch of the shortest alone; the way of
    the longest one alone; and each rank's work after the shortest way to it.
    """
    if times.scales:
        shortest, longest = min(times.scales), max(times.scales)
        alike = replace(times, scales=())
        ways = _Ways.of(placement, _scaled(alike, shortest))
        work = [min(ways.to_forward[s] for s in stages) + sum(times.scales) * sum(alike.of_stage(s) for s in stages)
                for stages in placement.chunks]
        return max(_Ways.of(placement, _scaled(alike, longest)).after_forward[0], *work,
                   lower_bound_of_limits(placement, micro_batches, _scaled(alike, shortest), activations, limits,
                                         kinds))
    ways = _Ways.of(placement, times)
    # A rank's stages together, and each as if the rank had no other.
    ranks = [_Rank(some, micro_batches, times, activations, limit)
             for stages, limit in zip(placement.chunks, limits, strict=True)
             for some in {stages, *((stage,) for stage in stages)}]
    return max(ways.after_forward[0],
               *(rank.bound_on_demand(ways, kinds) if kinds else rank.bound(ways) for rank in ranks))


def _scaled(times: Times, scale: float) -> Times:
    """All passes and copies `scale` times as long."""
    forward, input_grad, weight_grad, offload, reload = (
        tuple(scale * seconds for seconds in of_stages) for of_stages in
        (times.forward, times.input_grad, times.weight_grad, times.offload, times.reload))
    recompute = tuple(tuple(scale * seconds for seconds in of_layers) for of_layers in times.recompute)
    return replace(times, forward=forward, input_grad=input_grad, weight_grad=weight_grad, recompute=recompute,
                   offload=offload, reload=reload)


@dataclass(frozen=True)
class _Ways:
    """One micro-batch alone: for each stage, when its F and B can start, and how long the batch then lasts at least."""

    to_forward: Sequence[float]
    to_input_grad: Sequence[float]
    after_forward: Sequence[float]
    after_input_grad: Sequence[float]

    @classmethod
    def of(cls, placement: Placement, times: Times) -> _Ways:
        stages = range(placement.stages)
        delays = times.delays(placement)
        to_forward, after_input_grad = [0.0], [times.input_grad[0] + times.weight_grad[0]]
        for stage in stages[1:]:
            to_forward.append(to_forward[-1] + times.forward[stage - 1] + delays[stage - 1])
            after_input_grad.append(times.input_grad[stage]
                                    + max(times.weight_grad[stage], delays[stage - 1] + after_input_grad[-1]))
        to_input_grad = [to_forward[-1] + times.forward[-1]]
        after_forward = [times.forward[-1] + after_input_grad[-1]]
        for stage in reversed(stages[:-1]):
            to_input_grad.append(to_input_grad[-1] + times.input_grad[stage + 1] + delays[stage])
            after_forward.append(times.forward[stage] + delays[stage] + after_forward[-1])
        return cls(to_forward, to_input_grad[::-1], after_forward[::-1], after_input_grad)


class _Group(NamedTuple):
    """Stages of a rank whose activations have the same `size`."""

    size: float
    stages: Sequence[int]


@dataclass(frozen=True)
class _Rank:
    """What one rank can do within its limit."""

    stages: Sequence[int]
    micro_batches: int
    times: Times
    activations: Activations
    limit: float

    def bound(self, ways: _Ways) -> float:
        """Its work and the least that it idles."""
        forward, input_grad, weight_grad = self.times.forward, self.times.input_grad, self.times.weight_grad
        stages, whole = self.stages, self.activations.after_forward
        before = max(min(ways.to_forward[s] for s in stages),
                     min(ways.to_input_grad[s] for s in stages) - self._most_forwards())
        after_f = max(0.0, min(ways.after_forward[s] - forward[s] for s in stages) - self._most_backwards())
        after_b = self._idle_after_last_b(ways)
        all_fit = self.micro_batches * sum(whole[s] for s in stages) <= self.limit * (1 + _SLACK)
        around_f = max(before, after_f) if all_fit else before + after_f
        work = self.micro_batches * sum(forward[s] + input_grad[s] + weight_grad[s] for s in stages)
        return max(work + max(before + after_b, around_f), self._bound_of_memory(ways))

    def bound_on_demand(self, ways: _Ways, kinds: Collection[Kind]) -> float:
        """Whatever is recomputed or offloaded, as far as `kinds` allow."""
        forward, input_grad, weight_grad = self.times.forward, self.times.input_grad, self.times.weight_grad
        stages, idle = self.stages, self._idle_after_last_b(ways)
        choices = {s: list(options(s, self._trip(ways, s), self.times, self.activations, kinds)) for s in stages}
        # The engines for copies wait for the first F, and for the other engine's first or last copy, and B comes after
        # all of them. That is certain where anything is offloaded at all, so each micro-batch answers for a share.
        offloads = [option for of_stage in choices.values() for option in of_stage if option.out or option.back]
        around = (min(ways.to_forward[s] + forward[s] for s in stages) + min(ways.after_input_grad[s] for s in stages))
        share = 1 / (self.micro_batches * len(stages))
        around_out = share * (around + min((option.back for option in offloads), default=0.0))
        around_back = share * (around + min((option.out for option in offloads), default=0.0))
        costs = [self.micro_batches * np.array([
            (forward[s] + input_grad[s] + weight_grad[s] + option.recompute,
             option.out + around_out * (option.out > 0),
             option.back + around_back * (option.back > 0),
             (option.area + self._area_of_w(s)) / self.limit) for option in choices[s]]) for s in stages]
        bases = (min(ways.to_forward[s] for s in stages) + idle, 0.0, 0.0,
                 self._outside_memory(ways) + self._area_of_slopes() / self.limit)
        backwards = self.micro_batches * sum(input_grad[s] + weight_grad[s] for s in stages)
        return max(min(ways.to_input_grad[s] for s in stages) + backwards + idle, least_of_mixtures(bases, costs))

    def _idle_after_last_b(self, ways: _Ways) -> float:
        """What the rank idles at least from the start of its last B, when of what it keeps only W is left."""
        whole, input_grad, weight_grad = (self.activations.after_forward, self.times.input_grad,
                                          self.times.weight_grad)
        return max(0.0, min(ways.after_input_grad[s] - input_grad[s] - weight_grad[s]
                            - self._most_weight_grads(self.limit - whole[s]) for s in self.stages))

    def _trip(self, ways: _Ways, stage: int) -> float:
        """The least time from the start of a micro-batch's F to the end of its B."""
        return ways.to_input_grad[stage] - ways.to_forward[stage] + self.times.input_grad[stage]

    def _area_of_w(self, stage: int) -> float:
        """Memory x time of a W: half of what it gives back, or all of it."""
        whole, kept = self.activations.after_forward[stage], self.activations.after_backward[stage]
        return min(whole, kept / 2) * self.times.weight_grad[stage]

    def _area_of_slopes(self) -> float:
        """Memory x time below the limit that can't be used, after the first F has begun and before the last B ends."""
        whole, kept = self.activations.after_forward, self.activations.after_backward
        forward, input_grad, stages = self.times.forward, self.times.input_grad, self.stages
        most = max(max(whole[s], kept[s], *(self.activations.recomputed[s] if self.activations.recomputed else ()))
                   for s in stages)
        room = max(0.0, self.limit - most)
        slopes = room * (min(forward[s] / whole[s] if whole[s] else inf for s in stages)
                         + min(input_grad[s] / whole[s] if whole[s] else inf for s in stages))
        apart = slopes <= self.micro_batches * sum(forward[s] + input_grad[s] for s in stages)
        return room * slopes / 2 if apart else 0.0

    def _outside_memory(self, ways: _Ways) -> float:
        """The time before the first F and after the last B, less that of the last W."""
        input_grad, weight_grad, stages = self.times.input_grad, self.times.weight_grad, self.stages
        return (min(ways.to_forward[s] for s in stages) + min(ways.after_input_grad[s] - input_grad[s] for s in stages)
                - max(weight_grad[s] for s in stages))

    def _bound_of_memory(self, ways: _Ways) -> float:
        """The least time in which all activations can have been there for as long as they must."""
        whole, weight_grad, stages = self.activations.after_forward, self.times.weight_grad, self.stages
        taken = self._area_of_slopes() + self.micro_batches * sum(
            whole[s] * self._trip(ways, s) + self._area_of_w(s) for s in stages)
        return self._outside_memory(ways) + max(taken / self.limit, max(weight_grad[s] for s in stages))

    def _fitting(self, seconds: Sequence[float], groups: Sequence[_Group],
                 room: float) -> Iterator[tuple[float, float]]:
        """What fits into `room` of whole activations, by how many of each group: the most `seconds` [stage] that so
        many have together, and the room that is left.

        The last group gets as many as fit: fewer are never better.
        """
        size, stages = groups[0]
        every = self.micro_batches * len(stages)
        most = every if size * every <= room else floor(room / size + _SLACK)
        longest = sorted((seconds[s] for s in stages), reverse=True)
        for count in range(most + 1) if len(groups) > 1 else (most,):
            full, rest = divmod(count, self.micro_batches)
            together = self.micro_batches * sum(longest[:full]) + (rest * longest[full] if rest else 0.0)
            left = max(0.0, room - count * size)
            if len(groups) == 1:
                yield together, left
            else:
                yield from ((together + more, still) for more, still in self._fitting(seconds, groups[1:], left))

    @cached_property
    def _groups(self) -> tuple[_Group, ...]:
        """The rank's stages in up to two groups, each with the least size in it: where more sizes differ, a little more
        seems to fit than does."""
        whole = self.activations.after_forward
        stages = sorted(self.stages, key=lambda s: whole[s])
        sizes = [whole[s] for s in stages]
        cut = max(range(1, len(stages)), key=lambda place: sizes[place] - sizes[place - 1], default=0)
        if cut == 0 or sizes[cut] == sizes[cut - 1]:
            return (_Group(sizes[0], stages),)
        return _Group(sizes[0], stages[:cut]), _Group(sizes[cut], stages[cut:])

    def _most_forwards(self) -> float:
        """The longest that forwards alone can take."""
        return max(seconds for seconds, _ in self._fitting(self.times.forward, self._groups, self.limit))

    def _most_backwards(self) -> float:
        """The longest that B and W of what is kept can take."""
        backward = [input_grad + weight_grad for input_grad, weight_grad
                    in zip(self.times.input_grad, self.times.weight_grad)]
        return max(seconds + self._most_weight_grads(left)
                   for seconds, left in self._fitting(backward, self._groups, self.limit))

    def _most_weight_grads(self, room: float) -> float:
        """The longest that W of what B left in `room` can take: fractions may be left."""
        kept, weight_grad = self.activations.after_backward, self.times.weight_grad
        every = self.micro_batches * sum(weight_grad[s] for s in self.stages)
        if any(kept[s] <= 0 < weight_grad[s] for s in self.stages):
            return every
        return min(every, max(0.0, room) * max((weight_grad[s] / kept[s] for s in self.stages if kept[s] > 0),
                                               default=0.0))
