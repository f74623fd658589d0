"""Random programs for hypothesis: what is simple comes first, since it shrinks that way."""

from __future__ import annotations

from hypothesis import strategies as st
from split_programs.program import Program, Step
from split_programs.steps import HOLDERS, LEAVES

# Steps (kind, variant) that are left out until the split handles them.
AWAITED: frozenset[tuple[str, str]] = frozenset()


def _of(table: dict[str, dict[str, object]]) -> st.SearchStrategy[tuple[str, str]]:
    """A step's kind and variant, each kind about as often as the others."""
    names = []
    for kind, variants in table.items():
        known = [(kind, variant) for variant in variants if (kind, variant) not in AWAITED]
        names.extend(known * max(1, 20 // len(known)) if known else [])
    return st.sampled_from(names)


def _named(named: tuple[str, str], weight: int, body: tuple[Step, ...] = ()) -> Step:
    return Step(named[0], named[1], weight, body)


# Most steps have a weight; the frozen one is rarer.
_numbers = st.sampled_from([0, 0, 0, 1, 1, 2])
_leaves = st.builds(_named, _of(LEAVES), _numbers)
_steps = st.recursive(
    _leaves,
    lambda inner: st.builds(_named, _of(HOLDERS), _numbers, st.lists(inner, min_size=1, max_size=2).map(tuple)),
    max_leaves=3)
_stages = st.lists(st.lists(_steps, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)

programs = st.builds(
    Program, _stages, dtype=st.sampled_from(["float64", "float32", "float32", "bfloat16"]),
    micro_batches=st.integers(1, 3), order=st.lists(st.integers(0, 5), max_size=16).map(tuple),
    pieces=st.sampled_from([1, 1, 2, 3]), fused=st.booleans(), operators=st.sampled_from(["matrix", "all"]),
    tied=st.sampled_from([False, False, False, True]), leaf=st.booleans(), wanted=st.booleans(),
    around=st.sampled_from(["", "", "", "F", "FBW"]))
