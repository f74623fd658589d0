"""How fast any schedule could be: a proven lower bound on the time of a batch.

The bound holds for every order on a placement that keeps at most k activations on a rank, with the backward split or
whole (a whole backward is a split one that sends its input gradient late). Per rank it adds to the rank's work the
time that the rank must idle at both ends of the batch:

    time 0                  h                                    s              makespan
    |-- before: F only -----|---------- anything ----------------|-- after ------|

    before   No B can start on the rank before h, when the first micro-batch has gone up to the last stage and come
             back down. Until then the rank runs forwards alone, of which it can keep k: it idles h - k F or more.
             Nor can it start before its first F can.
    after F  Let s be the start of the rank's last F. That micro-batch still has to reach the last stage and come all
             the way back to W of stage 0: the batch ends `tail` later or after. In this time the rank has that F to do,
             and B and W of what it keeps, at most k: it idles tail - F - k (B + W) or more.
    after B  The same from the start of the rank's last B, when of what it keeps only W is left beside that B.

`before` and `after B` don't overlap, since s >= h for a B. `before` and `after F` overlap only if all the rank's
forwards start before its first B can; then it keeps them all, so there are no more than k of them, and the greater of
the two idle times counts instead of their sum. With unit times on the V placement the last rank gives the paper's
6 n + 6 p - 3 k - 1 ("Pipeline Parallelism with Controllable Memory", appendix), which needs k < 2 n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.timeline import Times


def lower_bound(placement: Placement, micro_batches: int, times: Times, peak: float) -> float:
    """The least makespan of `micro_batches` on `placement` if no rank keeps more than `peak` activations.

    `peak` counts activations of 1/(2p) of the model, as `timeline.peak_activations` does; it must hold one stage's.
    """
    kept = floor(peak * placement.stages / (2 * placement.ranks) + 1e-9)
    if kept < 1:
        raise ValueError(f"a peak of {peak:g} can't hold the activations of one stage")
    ways = _Ways.of(placement, times)
    return max(ways.after_forward[0], *(_bound_of_rank(stages, micro_batches, times, kept, ways)
                                        for stages in placement.chunks))


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
        # hops[s]: from stage s to stage s + 1, either way.
        hops = [times.hop * (placement.rank_of(stage) != placement.rank_of(stage + 1)) for stage in stages[:-1]]
        to_forward, after_input_grad = [0.0], [times.input_grad[0] + times.weight_grad[0]]
        for stage in stages[1:]:
            to_forward.append(to_forward[-1] + times.forward[stage - 1] + hops[stage - 1])
            after_input_grad.append(times.input_grad[stage]
                                    + max(times.weight_grad[stage], hops[stage - 1] + after_input_grad[-1]))
        to_input_grad = [to_forward[-1] + times.forward[-1]]
        after_forward = [times.forward[-1] + after_input_grad[-1]]
        for stage in reversed(stages[:-1]):
            to_input_grad.append(to_input_grad[-1] + times.input_grad[stage + 1] + hops[stage])
            after_forward.append(times.forward[stage] + hops[stage] + after_forward[-1])
        return cls(to_forward, to_input_grad[::-1], after_forward[::-1], after_input_grad)


def _bound_of_rank(stages: Sequence[int], micro_batches: int, times: Times, kept: int, ways: _Ways) -> float:
    forward, input_grad, weight_grad = times.forward, times.input_grad, times.weight_grad
    forwards = micro_batches * len(stages)
    kept = min(kept, forwards)
    before = max(min(ways.to_forward[s] for s in stages),
                 min(ways.to_input_grad[s] for s in stages) - kept * max(forward[s] for s in stages))
    after_f = max(0.0, min(ways.after_forward[s] - forward[s] for s in stages)
                  - kept * max(input_grad[s] + weight_grad[s] for s in stages))
    after_b = max(0.0, min(ways.after_input_grad[s] - input_grad[s] for s in stages)
                  - kept * max(weight_grad[s] for s in stages))
    around_f = before + after_f if kept < forwards else max(before, after_f)
    return micro_batches * sum(forward[s] + input_grad[s] + weight_grad[s] for s in stages) + max(
        before + after_b, around_f)
