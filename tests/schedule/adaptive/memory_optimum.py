"""The least makespan with recomputation and offload, by trying all orders: shares nothing with the planner.

Passes are appended in the order of their starts, each as early as can be, whatever the rank could do next; what can't
end early enough any more is given up. On each stage F, B and W run whole and in micro-batch order, and O comes only
before what takes memory, as it would wait for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import NamedTuple, TypeVar

from ds_vshape.schedule.adaptive import Problem
from ds_vshape.schedule.passes import B, C, F, Kind, O, R, W

T = TypeVar("T")

_CLOSE = 1e-9
_TAKES_MEMORY = (Kind.F, Kind.C, Kind.O, Kind.R)


class _Activation(NamedTuple):
    """What is done with a stage's micro-batch: when things have ended or will have, inf for what isn't begun."""

    recomputed: bool = False
    offloaded: bool = False
    forward: float = inf
    out: float = inf
    freed: bool = False
    back: float = inf
    again: float = inf
    backward: float = inf
    weights: float = inf


class _State(NamedTuple):
    """All that decides how it can go on. [stage][micro-batch] and [rank]."""

    now: tuple[float, int]
    activations: tuple[tuple[_Activation, ...], ...]
    free: tuple[float, ...]
    out_free: tuple[float, ...]
    back_free: tuple[float, ...]
    alive: tuple[float, ...]
    after_o: tuple[bool, ...]


def least_makespan(problem: Problem, below: float = inf) -> float:
    """That of all orders, or `below` if none is less."""
    return _Search(problem, below).least


class _Search:
    def __init__(self, problem: Problem, below: float) -> None:
        self._problem, self.least = problem, below
        self._seen: set[_State] = set()
        self._hops = problem.times.delays(problem.placement)
        ranks = problem.ranks
        zeros = (0.0,) * ranks
        nothing = tuple((_Activation(),) * problem.micro_batches for _ in range(problem.placement.stages))
        self._go_on(_State((0.0, 0), nothing, zeros, zeros, zeros, zeros, (False,) * ranks))

    def _go_on(self, state: _State) -> None:
        if self._bound(state) >= self.least - _CLOSE:
            return
        now = state.now[0]
        # What is over is over.
        seen = state._replace(
            activations=tuple(tuple(_since(each, now) for each in row) for row in state.activations),
            free=tuple(max(time, now) for time in state.free),
            out_free=tuple(max(time, now) for time in state.out_free),
            back_free=tuple(max(time, now) for time in state.back_free))
        if seen in self._seen:
            return
        self._seen.add(seen)
        if all(each.weights < inf for row in state.activations for each in row):
            self.least = max(each.weights for row in state.activations for each in row)
            return
        for following in sorted(self._following(state), key=lambda each: each.now):
            self._go_on(following)

    def _bound(self, state: _State) -> float:
        """How early all can be done: each rank's work, and each micro-batch's way."""
        times, placement = self._problem.times, self._problem.placement
        least = 0.0
        for rank, stages in enumerate(placement.chunks):
            left = 0.0
            for stage in stages:
                for each in state.activations[stage]:
                    left += times.forward[stage] * (each.forward == inf)
                    left += times.input_grad[stage] * (each.backward == inf)
                    left += times.weight_grad[stage] * (each.weights == inf)
                    left += times.of(C(stage, 0)) * (each.recomputed and each.again == inf)
            least = max(least, max(state.free[rank], state.now[0]) + left if left else 0.0)
        for number in range(self._problem.micro_batches):
            end = 0.0
            for stage in range(placement.stages):
                done = state.activations[stage][number].forward
                hop = self._hops[stage - 1] if stage else 0.0
                end = done if done < inf else end + hop + times.forward[stage]
            for stage in reversed(range(placement.stages)):
                done = state.activations[stage][number].backward
                hop = self._hops[stage] if stage < placement.last_stage else 0.0
                end = done if done < inf else end + hop + times.input_grad[stage]
            least = max(least, end + times.weight_grad[0] * (state.activations[0][number].weights == inf))
        return least

    def _following(self, state: _State) -> Iterator[_State]:
        for rank, stages in enumerate(self._problem.placement.chunks):
            for stage in stages:
                row = state.activations[stage]
                for number, each in enumerate(row):
                    before = row[number - 1] if number else None
                    yield from self._steps(state, rank, stage, number, each, before)

    def _steps(self, state: _State, rank: int, stage: int, number: int, each: _Activation, before: _Activation | None
               ) -> Iterator[_State]:
        """What `rank` may do next with a stage's micro-batch."""
        problem, activations = self._problem, state.activations
        last = problem.placement.last_stage
        if each.forward == inf:
            ready = activations[stage - 1][number].forward + self._hops[stage - 1] if stage else 0.0
            if ready < inf and (before is None or before.forward < inf):
                for recomputed in (False, True) if problem.recompute else (False,):
                    for offloaded in (False, True) if problem.offload else (False,):
                        yield from self._step(state, rank, Kind.F, stage, number,
                                              each._replace(recomputed=recomputed, offloaded=offloaded), ready)
            return
        if each.offloaded and not each.freed and each.backward == inf:
            yield from self._step(state, rank, Kind.O, stage, number, each, each.out)
            return
        if each.offloaded and each.back == inf and each.backward == inf:
            yield from self._step(state, rank, Kind.R, stage, number, each, 0.0)
            return
        back = each.back if each.offloaded else 0.0
        if each.recomputed and each.again == inf:
            yield from self._step(state, rank, Kind.C, stage, number, each, back)
            return
        if each.backward == inf:
            ready = activations[stage + 1][number].backward + self._hops[stage] if stage < last else each.forward
            if ready < inf and (before is None or before.backward < inf):
                yield from self._step(state, rank, Kind.B, stage, number, each, max(ready, back))
        elif each.weights == inf and (before is None or before.weights < inf):
            yield from self._step(state, rank, Kind.W, stage, number, each, 0.0)

    def _step(self, state: _State, rank: int, kind: Kind, stage: int, number: int, each: _Activation, ready: float
              ) -> Iterator[_State]:
        """The state after one more action, if it may be the next."""
        times, sizes = self._problem.times, self._problem.activations
        again = C(stage, number) if each.recomputed else None
        action = {Kind.F: F, Kind.B: B, Kind.W: W, Kind.C: C, Kind.O: O, Kind.R: R}[kind](stage, number)
        at_start, at_end = sizes.change(action, again)
        start = max(state.free[rank], ready)
        if ((start, rank) < state.now or state.alive[rank] + at_start > self._problem.limits[rank] + _CLOSE
                or (state.after_o[rank] and kind not in _TAKES_MEMORY)):
            return
        end = start if kind.is_copy else start + times.of(action)
        out_free, back_free = state.out_free, state.back_free
        if kind is Kind.F:
            each = each._replace(forward=end)
            if each.offloaded:
                out = max(end, out_free[rank]) + times.of_copy(O(stage, number), again)
                each, out_free = each._replace(out=out), _with(out_free, rank, out)
        elif kind is Kind.O:
            each = each._replace(freed=True)
        elif kind is Kind.R:
            back = max(end, back_free[rank]) + times.of_copy(action, again)
            each, back_free = each._replace(back=back), _with(back_free, rank, back)
        elif kind is Kind.C:
            each = each._replace(again=end)
        elif kind is Kind.B:
            each = each._replace(backward=end)
        else:
            each = each._replace(weights=end)
        yield _State((start, rank), _with(state.activations, stage, _with(state.activations[stage], number, each)),
                     _with(state.free, rank, end), out_free, back_free,
                     _with(state.alive, rank, state.alive[rank] + at_start + at_end),
                     _with(state.after_o, rank, kind is Kind.O))


def _since(each: _Activation, now: float) -> _Activation:
    return each._replace(forward=max(each.forward, now), out=max(each.out, now), back=max(each.back, now),
                         again=max(each.again, now), backward=max(each.backward, now), weights=max(each.weights, now))


def _with(values: tuple[T, ...], place: int, value: T) -> tuple[T, ...]:
    return (*values[:place], value, *values[place + 1:])
