"""A population of building blocks: the best of each number of pieces of W, and their descendants."""

from __future__ import annotations

from collections.abc import Iterator

from ds_vshape.schedule.adaptive.blocks import PATIENCES, BlockParameters
from ds_vshape.schedule.adaptive.list_scheduler import PolicyRun
from ds_vshape.schedule.adaptive.trials import Trials

# How many blocks are kept for each number of pieces of W.
_SIZE = 10
# How often a descendant has two parents, and how often a late one has single ranks moved.
_MIXED, _SHIFTED = 0.3, 0.5


class Population:
    """The good blocks of a search."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._chunks = trials.problem.placement.chunks_each
        # Makespans and blocks, by the number of pieces, best first, no makespan twice.
        self._members: dict[int, list[tuple[float, BlockParameters]]] = {}

    def __bool__(self) -> bool:
        return bool(self._members)

    def blocks(self, most: int = _SIZE) -> Iterator[BlockParameters]:
        """Up to `most` of each number of pieces."""
        for members in self._members.values():
            yield from (block for _, block in members[:most])

    def runs(self) -> Iterator[PolicyRun]:
        """The runs of all members."""
        scheduler = self._trials.scheduler
        for block in self.blocks():
            run = scheduler.run(block.policy(scheduler))
            if run is not None:
                yield run

    def add(self, block: BlockParameters) -> None:
        """Run `block`, and take it in if it's good enough."""
        members = self._members.setdefault(block.pieces, [])
        full = len(members) >= _SIZE
        run = self._trials.run_policy(block.policy(self._trials.scheduler), members[-1][0] if full else float("inf"))
        if run is None:
            return
        same = next((index for index, (makespan, _) in enumerate(members) if makespan == run.makespan), None)
        if same is not None:
            members[same] = (run.makespan, block)
            return
        if full:
            members.pop()
        members.append((run.makespan, block))
        members.sort(key=lambda member: member[0])

    def add_fastest(self) -> None:
        """Blocks that run under any limits: every micro-batch as fast as it can."""
        for patience in PATIENCES:
            self.add(BlockParameters.fastest(patience, self._chunks))

    def add_known(self, until: float) -> None:
        """Blocks that are known to be good, while more than `until` of the time is left."""
        for block in BlockParameters.known(self._trials.problem.max_pieces, self._chunks):
            if self._trials.left() > until and not self._trials.done:
                self.add(block)

    def add_random(self) -> None:
        """Any block."""
        self.add(BlockParameters.random(self._trials.problem.max_pieces, self._trials.random, self._chunks))

    def add_descendant(self, late: bool) -> None:
        """A variant of a good block. Only a `late` one may move single ranks out of the common pattern."""
        self.add(self._descendant(late))

    def add_those_of(self, other: Population) -> None:
        """The blocks of another number of ranks, while there is time."""
        for block in other.blocks():
            if not self._trials.done:
                self.add(block.for_ranks(self._trials.problem.ranks))

    def _descendant(self, late: bool) -> BlockParameters:
        random = self._trials.random
        members = self._members[random.choice(list(self._members))]
        block = random.choice(members)[1]
        if random.random() < _MIXED:
            return block.mixed(random.choice(members)[1], random)
        if late and random.random() < _SHIFTED:
            return block.shifted(self._trials.problem.ranks, random)
        return block.mutated(random)
