"""The deadlock checker: good programs pass, each kind of broken one is named, and a second simulator agrees."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, permutations, product

import pytest
from programs import (COMMUNICATORS, Communicator, Programs, lowered, of_all, of_the_direction, of_the_pair, own,
                      shuffled)

from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.lowering import (AwaitOffload, AwaitReceive, AwaitReload, AwaitSend, Channel, Content, Load,
                                         Message, Offload, PostReceive, Program, Reload, Run, Send, ShareLoss, Step,
                                         lower)
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import BW, B, C, F, Kind, O, Pass, R, W
from ds_vshape.schedule.placement import Placement, linear
from ds_vshape.schedule.proofs.deadlock import check
from ds_vshape.schedule.proofs.rendezvous import DeadlockError
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times


@pytest.mark.parametrize("name", SCHEDULES)
def test_good_programs_pass(name: str) -> None:
    for ranks in (1, 2, 3, 4, 7):
        for micro_batches in (1, 2, 5, 9):
            programs, placement = lowered(name, ranks, micro_batches)
            check(programs, placement)
            evaluation = lower(forward_only(placement, micro_batches), Times.uniform(placement.stages))
            check(evaluation, placement)


# -- what is offloaded and recomputed


def test_copies_and_recomputation_stand_in_turn_between_forward_and_backward() -> None:
    """All programs of some of these steps in any order, against the list of the good ones."""
    out, back = O(0, 0), R(0, 0)
    f, c, bw = Run(F(0, 0)), Run(C(0, 0)), Run(BW(0, 0))
    copies = (Offload(out), AwaitOffload(out), Reload(back), AwaitReload(back))
    good = {(f, bw), (f, c, bw), (f, *copies, bw), (f, *copies, c, bw)}
    found = {program for number in range(6) for some in combinations((*copies, c), number)
             for program in permutations((f, *some, bw)) if passes((program,), linear(1))}
    assert found == good
    assert passes(((f, *copies, Run(B(0, 0)), Run(W(0, 0))),), linear(1))


def passes(programs: Programs, placement: Placement) -> bool:
    try:
        check(programs, placement)
    except DeadlockError:
        return False
    return True


@pytest.mark.parametrize(("text", "message"), [
    ("F Offload BW", r"runs BW0\.0 before what was offloaded is back: it is at Offload"),
    ("F Offload AwaitOffload Reload BW", "back: it is at Reload"),
    ("F AwaitOffload BW", r"AwaitOffload\(action=O0\.0\) without Offload right before"),
    ("F BW Offload", r"after its backward"), ("Offload F BW", r"before F0\.0 or after"),
    ("F C Offload", "after what was forgotten is recomputed"), ("F C C BW", r"runs C0\.0 twice"),
    ("F BW C", r"runs C0\.0 after the backward"), ("C F BW", r"runs C0\.0 before F0\.0"),
    ("F Offload", r"offloads F0\.0, but never runs its backward")])
def test_a_broken_copy_is_named(text: str, message: str) -> None:
    steps = {"F": Run(F(0, 0)), "C": Run(C(0, 0)), "BW": Run(BW(0, 0)), "Offload": Offload(O(0, 0)),
             "AwaitOffload": AwaitOffload(O(0, 0)), "Reload": Reload(R(0, 0)), "AwaitReload": AwaitReload(R(0, 0))}
    with pytest.raises(DeadlockError, match=message):
        check((tuple(steps[word] for word in text.split()),), linear(1))


# -- broken programs

# Rank 0's program of 1F1B with two ranks and micro-batches is, runs and loads aside:
#   post G0 / F / send A0 / post G1 / F / send A1 / release A0 / await G0 / BW / release A1 / await G1 / BW
# and rank 1's: post A0, post A1 / await A0 / F, BW / send G0 / await A1 / F, BW / send G1 / release G0, release G1
A0, A1 = (Message(Channel(0, 1, Content.ACTIVATION), 1, micro_batch) for micro_batch in (0, 1))
G0, G1 = (Message(Channel(1, 0, Content.GRADIENT), 0, micro_batch) for micro_batch in (0, 1))


def without(program: Program, *steps: Step) -> Program:
    assert set(steps) <= set(program)
    return tuple(step for step in program if step not in steps)


def swapped(program: Program, one: Step, other: Step) -> Program:
    exchange = {one: other, other: one}
    assert set(exchange) <= set(program)
    return tuple(exchange.get(step, step) for step in program)


def moved(program: Program, step: Step, before: Step) -> Program:
    rest = list(without(program, step))
    rest.insert(rest.index(before), step)
    return tuple(rest)


def before(program: Program, step: Step, added: Step) -> Program:
    place = program.index(step)
    return (*program[:place], added, *program[place:])


def run(program: Program, text: str) -> Step:
    return next(step for step in program if isinstance(step, Run) and str(step.action) == text)


Break = Callable[[Program, Program], tuple[Program, Program]]

BROKEN: dict[str, tuple[Break, str]] = {
    "receives swapped": (
        lambda p, q: (p, swapped(q, PostReceive(A0), PostReceive(A1))),
        r"messages 0->1: number 0 is sent as activation of 1.0 .* and received as activation of 1.1"),
    "sends swapped": (
        lambda p, q: (swapped(p, Send(A0), Send(A1)), q),
        r"rank 0 sends activation of 1.1 \(0->1\) before F0.1 has made it"),
    "a receive that is never posted": (
        lambda p, q: (p, without(q, PostReceive(A1))),
        r"rank 1 waits for activation of 1.1 \(0->1\) before it started it"),
    "a receive that is neither posted nor awaited": (
        lambda p, q: (p, without(q, PostReceive(A1), AwaitReceive(A1))),
        r"rank 1 runs F1.1 without having waited for activation of 1.1 \(0->1\)"),
    "a message that is never sent": (
        lambda p, q: (without(p, Send(A1), AwaitSend(A1)), q),
        r"messages 0->1: activation of 1.1 \(0->1\) is received by one end only; 1 messages are sent and 2"),
    "a message that nobody receives": (
        lambda p, q: (without(p, PostReceive(G1), AwaitReceive(G1), run(p, "BW0.1")), q),
        r"messages 1->0: gradient of 0.1 \(1->0\) is sent by one end only; 2 messages are sent and 1"),
    "a send before the pass that makes its message": (
        lambda p, q: (moved(p, Send(A1), run(p, "F0.1")), q),
        r"rank 0 sends activation of 1.1 \(0->1\) before F0.1 has made it"),
    "a gradient that is sent before its backward": (
        lambda p, q: (p, moved(q, Send(G1), run(q, "BW1.1"))),
        r"rank 1 sends gradient of 0.1 \(1->0\) before B1.1 has made it"),
    "a forward before its data": (
        lambda p, q: (moved(p, Load(1), run(p, "BW0.0")), q), "rank 0 runs F0.1 before it has loaded the micro-batch"),
    "a forward without its data": (
        lambda p, q: (without(p, Load(1)), q), "rank 0 runs F0.1 before it has loaded the micro-batch"),
    "data that are loaded twice": (
        lambda p, q: (p + (Load(1),), q), "rank 0 loads micro-batch 1 twice"),
    "a pass that runs twice": (
        lambda p, q: (p + (run(p, "BW0.1"),), q), "rank 0 runs BW0.1 twice"),
    "a pass on a rank that hasn't its stage": (
        lambda p, q: (p + (run(q, "F1.1"),), q), "rank 0 runs F1.1, but its stage is on rank 1"),
    "a message that is sent and received twice": (
        lambda p, q: (p + (Send(A1), AwaitSend(A1)),
                      before(before(q, run(q, "F1.1"), PostReceive(A1)), run(q, "F1.1"), AwaitReceive(A1))),
        r"messages 0->1: activation of 1.1 \(0->1\) is sent twice"),
    "a message that no pass takes": (
        lambda p, q: (without(p, run(p, "BW0.1")), q),
        r"rank 0 receives gradient of 0.1 \(1->0\), but never runs B0.1"),
    "a wait for a send that comes later": (
        lambda p, q: (moved(p, AwaitSend(A1), Send(A1)), q),
        r"rank 0 waits for activation of 1.1 \(0->1\) before it started it"),
    # Rank 1 posts A1 only behind F1.0 here, rank 0 wants A1 gone before it offers room for G0.
    "a wait for a send before the peer can post": (
        lambda p, q: (moved(moved(moved(p, AwaitSend(A1), AwaitReceive(G0)), PostReceive(G0), AwaitReceive(G0)),
                            PostReceive(G1), AwaitReceive(G0)),
                      moved(moved(q, AwaitSend(G0), AwaitReceive(A1)), PostReceive(A1), AwaitReceive(A1))),
        r"deadlock \(receives start when posted\): rank 0 at AwaitSend\(message=activation of 1.1 \(0->1\)\); "
        r"rank 1 at AwaitSend\(message=gradient of 0.0 \(1->0\)\)"),
    "a wait that only late receives turn into a deadlock": (
        lambda p, q: (moved(p, AwaitSend(A1), AwaitReceive(G0)), moved(q, AwaitSend(G0), AwaitReceive(A1))),
        r"deadlock \(receives start when waited for\): rank 0 at AwaitSend.*activation of 1.1.*; rank 1 at AwaitSend"),
    "a forward before its input": (
        lambda p, q: (p, moved(q, run(q, "F1.1"), AwaitReceive(A1))),
        r"rank 1 runs F1.1 without having waited for activation of 1.1 \(0->1\)"),
    "a backward before its output gradient": (
        lambda p, q: (moved(p, run(p, "BW0.1"), AwaitReceive(G1)), q),
        r"rank 0 runs BW0.1 without having waited for gradient of 0.1 \(1->0\)"),
    "a backward before its forward": (
        lambda p, q: (p, moved(q, run(q, "BW1.1"), run(q, "F1.1"))),
        "rank 1 runs BW1.1 before F1.1"),
    "a send nobody waits for": (
        lambda p, q: (without(p, AwaitSend(A1)), q),
        r"rank 0 never waits for its send of activation of 1.1 \(0->1\)"),
    "a receive nobody waits for": (
        lambda p, q: (without(p, AwaitReceive(G1), run(p, "BW0.1")), q),
        r"rank 0 never waits for its receive of gradient of 0.1 \(1->0\)"),
    "a send at the wrong end": (
        lambda p, q: (without(p, Send(A1), AwaitSend(A1)), q + (Send(A1), AwaitSend(A1))),
        r"rank 1 is at the wrong end of activation of 1.1 \(0->1\)"),
    "a receive at the wrong end": (
        lambda p, q: (p + (PostReceive(A1), AwaitReceive(A1)), q),
        r"rank 0 is at the wrong end of activation of 1.1 \(0->1\)"),
    "a send that is waited for twice": (
        lambda p, q: (p + (AwaitSend(A1),), q),
        r"rank 0 waits for activation of 1.1 \(0->1\) before it started it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_programs_are_named(case: str) -> None:
    programs, placement = lowered("1f1b", 2, 2)
    check(programs, placement)
    spoil, message = BROKEN[case]
    with pytest.raises(DeadlockError, match=message):
        check(spoil(*programs), placement)


def test_a_pass_that_needs_another_of_its_own_rank() -> None:
    programs, placement = lowered("v-min", 2, 2)
    for rank, early, late, message in ((1, "F2.0", "F1.0", "rank 1 runs F2.0 before F1.0"),
                                       (1, "B1.0", "B2.0", "rank 1 runs B1.0 before B2.0"),
                                       (0, "W3.0", "B3.0", "rank 0 runs W3.0 before B3.0")):
        broken = list(programs)
        broken[rank] = moved(programs[rank], run(programs[rank], early), run(programs[rank], late))
        with pytest.raises(DeadlockError, match=message):
            check(broken, placement)


def test_a_whole_backward_is_an_input_gradient_too() -> None:
    on_one_rank = Placement("linear", ((0, 1),))
    order = (F(0, 0), F(1, 0), BW(1, 0), BW(0, 0))
    check(lower(Schedule("whole", on_one_rank, 1, (order,)), Times.uniform(2)), on_one_rank)
    with pytest.raises(DeadlockError, match="rank 0 runs BW0.0 before B1.0"):
        check([tuple(Run(action) for action in (F(0, 0), F(1, 0), BW(0, 0), BW(1, 0)))], on_one_rank)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_communicator_for_both_directions_crosses_sends(name: str) -> None:
    # Both ranks post a receive before they send: in order on one communicator, each waits for the other's send.
    if name == "gpipe":
        # All its messages go one way first, and all go back then.
        check(*lowered(name, 4, 8), of_all)
        return
    for ranks, micro_batches in ((2, 2), (3, 2), (4, 8)):
        for shared in (of_the_pair, of_all):
            with pytest.raises(DeadlockError, match=r"deadlock \(receives start when posted\): rank \d at"):
                check(*lowered(name, ranks, micro_batches), shared)


# -- a second simulator


class Simulator:
    """Programs run by brute force: a state, and every single event that may come next.

    An event is a rank's next step, or the completion of one pair of operations. Rules as in the checker's docstring;
    without `in_order` only rendezvous binds.
    """

    def __init__(self, programs: Programs, communicator: Communicator, late: bool, in_order: bool = True) -> None:
        self._programs = [tuple(step for step in program if not isinstance(step, Run) and hasattr(step, "message"))
                          for program in programs]
        self._communicator, self._late, self._in_order = communicator, late, in_order

    State = tuple[tuple[int, ...], tuple[bool, ...], frozenset[Message]]

    def start(self) -> State:
        ranks = len(self._programs)
        return (0,) * ranks, (False,) * ranks, frozenset()

    def finished(self, state: State) -> bool:
        return all(place == len(program) for place, program in zip(state[0], self._programs))

    def next_states(self, state: State) -> Iterator[State]:
        places, arrived, complete = state
        for rank, (place, program) in enumerate(zip(places, self._programs)):
            if place == len(program):
                continue
            step = program[place]
            if isinstance(step, AwaitReceive) and not arrived[rank]:
                yield places, replaced(arrived, rank, True), complete
            elif not isinstance(step, (AwaitSend, AwaitReceive)) or step.message in complete:
                yield replaced(places, rank, place + 1), replaced(arrived, rank, False), complete
        started = [self._started(rank, places[rank], arrived[rank]) for rank in range(len(places))]
        for message in {message for operations in started for message in operations} - complete:
            ends = message.channel.source, message.channel.target
            if all(message in started[rank] and self._is_next(message, started[rank], complete) for rank in ends):
                yield places, arrived, complete | {message}

    def _started(self, rank: int, place: int, arrived: bool) -> list[Message]:
        """The messages that `rank` has started to send or receive, in that order."""
        done, program = [], self._programs[rank]
        noted: dict[tuple, list[Message]] = defaultdict(list)
        for step in program[:place + arrived]:
            if isinstance(step, Send) or isinstance(step, PostReceive) and not self._late:
                done.append(step.message)
            elif isinstance(step, PostReceive):
                noted[self._line(step.message)].append(step.message)
            elif isinstance(step, AwaitReceive) and step.message not in done:
                waiting = noted[self._line(step.message)]
                until = waiting.index(step.message) + 1
                done += waiting[:until]
                del waiting[:until]
        return done

    def _line(self, message: Message) -> tuple:
        """One direction of a communicator, on which the runtime starts receives in the order of their posts."""
        return message.channel.source, message.channel.target, self._communicator(message.channel)

    def _is_next(self, message: Message, started: list[Message], complete: frozenset[Message]) -> bool:
        """Whether everything before `message` on its communicator (or channel) is complete."""
        def same(other: Message) -> bool:
            return self._communicator(other.channel) == self._communicator(message.channel) if self._in_order \
                else other.channel == message.channel
        return all(other in complete for other in started[:started.index(message)] if same(other))

    def run(self, pick: random.Random) -> State:
        state = self.start()
        while following := list(self.next_states(state)):
            state = pick.choice(following)
        return state

    def all_ends(self) -> set[State]:
        """The final states of all interleavings."""
        @cache
        def ends(state: Simulator.State) -> frozenset[Simulator.State]:
            following = list(self.next_states(state))
            return frozenset().union(*map(ends, following)) if following else frozenset([state])
        return set(ends(self.start()))


def replaced(values: tuple, place: int, value: object) -> tuple:
    return (*values[:place], value, *values[place + 1:])


def verdict(programs: Programs, placement: Placement, communicator: Communicator) -> str:
    try:
        check(programs, placement, communicator)
    except DeadlockError as error:
        return str(error)
    return "good"


SEEN_IN_A_RUN = ("good", "deadlock (receives start when posted)", "deadlock (receives start when waited for)")


def test_random_interleavings_agree() -> None:
    verdicts = Counter()
    for seed in range(1500):
        pick = random.Random(seed)
        good, placement = lowered(pick.choice(sorted(SCHEDULES)), pick.randint(2, 3), pick.randint(1, 3))
        programs, communicator = shuffled(good, pick, pick.randint(0, 6)), pick.choice(COMMUNICATORS)
        found = verdict(programs, placement, communicator).split(":")[0]
        verdicts[found if found in SEEN_IN_A_RUN else "refused before any run"] += 1
        if found not in SEEN_IN_A_RUN:
            continue
        finishes = {}
        for late in (False, True):
            simulator = Simulator(programs, communicator, late)
            ends = {simulator.run(pick) for _ in range(3)}
            assert len(ends) == 1, "the result depends on the order of events"
            finishes[late] = simulator.finished(ends.pop())
        # The checker tries early receives first, and stops at the first deadlock.
        assert found == SEEN_IN_A_RUN[0 if all(finishes.values()) else 1 if not finishes[False] else 2]
        if found == "good":
            # What both rules let through, rendezvous alone does.
            simulator = Simulator(programs, communicator, pick.random() < 0.5, in_order=False)
            assert simulator.finished(simulator.run(pick))
    assert len(verdicts) == 4 and min(verdicts.values()) >= 2, verdicts


def test_all_interleavings_end_alike() -> None:
    verdicts = set()
    for name, communicator, changes in product(("1f1b", "v-min"), COMMUNICATORS, (0, 3, 6)):
        good, placement = lowered(name, 2, 2 if name == "1f1b" else 1)
        programs = shuffled(good, random.Random(changes), changes)
        found = verdict(programs, placement, communicator).split(":")[0]
        verdicts.add(found)
        if found not in SEEN_IN_A_RUN:
            continue
        finishes = {}
        for late in (False, True):
            simulator = Simulator(programs, communicator, late)
            end, = simulator.all_ends()
            finishes[late] = simulator.finished(end)
        assert found == SEEN_IN_A_RUN[0 if all(finishes.values()) else 1 if not finishes[False] else 2]
    assert verdicts >= {"good", "deadlock (receives start when posted)"}


# -- mutants, against a machine that passes values on


class Broken(Exception):
    """What the machine can't do."""


class Machine:
    """Runs programs as the runtime does, with a name for each tensor; a line, which is one direction of a communicator,
    is a list of what either end started.

    Nothing of the checker is used but the steps: a pass takes values from its rank's shelf and puts its results there.
    """

    def __init__(self, programs: Programs, placement: Placement, communicator: Communicator, late: bool) -> None:
        self.programs, self.last, self.late = programs, placement.last_stage, late
        self.communicator = communicator
        self.stages = [set(stages) for stages in placement.chunks]
        self.shelves: list[set[tuple]] = [set() for _ in programs]
        self.sent: dict[tuple, list[Message]] = defaultdict(list)
        self.posted: dict[tuple, list[Message]] = defaultdict(list)
        self.received: Counter[tuple] = Counter()
        self.released: set[Message] = set()
        self.has_data = any(isinstance(step, Load) for program in programs for step in program)

    def run(self) -> None:
        """To the end, or Broken."""
        places = [0] * len(self.programs)
        while True:
            before = list(places)
            for rank, program in enumerate(self.programs):
                while places[rank] < len(program) and self.do(rank, program[places[rank]]):
                    places[rank] += 1
            if places == before:
                break
        if places != [len(program) for program in self.programs]:
            raise Broken("stuck")
        if any(self.sent[line] != self.posted[line] for line in {*self.sent, *self.posted}):
            raise Broken("one end only")
        for program, shelf in zip(self.programs, self.shelves):
            waited_for = {(type(step), step.message) for step in program if hasattr(step, "message")}
            if any((wait, step.message) not in waited_for for step in program for start, wait in
                   ((Send, AwaitSend), (PostReceive, AwaitReceive)) if isinstance(step, start)):
                raise Broken("nobody waits")
            if any(value[0] in ("input", "output gradient") and value[-1] == "came" for value in shelf):
                raise Broken("nobody takes it")

    def do(self, rank: int, step: Step) -> bool:
        """Do a step, or return False if it waits."""
        if isinstance(step, Load):
            self.give(rank, ("data", step.micro_batch))
        elif isinstance(step, Run):
            self.compute(rank, step.action)
        elif isinstance(step, (Send, PostReceive)):
            channel, stage, micro_batch = step.message
            if rank != (channel.source if isinstance(step, Send) else channel.target):
                raise Broken("wrong end")
            if isinstance(step, Send):
                name = "output" if channel.content is Content.ACTIVATION else "input gradient"
                made = stage - 1 if channel.content is Content.ACTIVATION else stage + 1
                self.need(rank, (name, made, micro_batch))
            started = self.sent if isinstance(step, Send) else self.posted
            if step.message in started[self.line(channel)]:
                raise Broken("twice")
            started[self.line(channel)].append(step.message)
        elif isinstance(step, ShareLoss):
            pass
        else:
            return self.wait(rank, step)
        return True

    def wait(self, rank: int, step: Step) -> bool:
        channel, stage, micro_batch = step.message
        line = self.line(channel)
        mine, others = self.sent[line], self.posted[line]
        if isinstance(step, AwaitReceive):
            mine, others = others, mine
        if step.message not in mine:
            raise Broken("not started")
        number = mine.index(step.message)
        if isinstance(step, AwaitReceive):
            self.received[line] = max(self.received[line], number + 1)
        begun = self.received[line] if self.late else len(self.posted[line])
        if number >= min(begun, len(self.sent[line])):
            return False
        if mine[:number + 1] != others[:number + 1]:
            raise Broken("another message")
        if isinstance(step, AwaitSend):
            if step.message in self.released:
                raise Broken("gone already")
            self.released.add(step.message)
        else:
            name = "input" if channel.content is Content.ACTIVATION else "output gradient"
            self.give(rank, (name, stage, micro_batch, "came"))
        return True

    def line(self, channel: Channel) -> tuple:
        return channel.source, channel.target, self.communicator(channel)

    def compute(self, rank: int, action: Pass) -> None:
        stage, micro_batch = action.stage, action.micro_batch
        at = stage, micro_batch
        if stage not in self.stages[rank]:
            raise Broken("not its stage")
        if action.kind is Kind.F:
            if stage in (0, self.last) and self.has_data:
                self.need(rank, ("data", micro_batch))
            if stage:
                self.take(rank, "input", "output", stage, stage - 1, micro_batch)
            self.give(rank, ("output", *at))
        elif action.kind is Kind.W:
            self.need(rank, ("left for W", *at, action.piece))
            self.shelves[rank].discard(("left for W", *at, action.piece))
            if action.piece < action.pieces - 1:
                self.give(rank, ("left for W", *at, action.piece + 1))
        else:
            self.need(rank, ("output", *at))
            if stage < self.last:
                self.take(rank, "output gradient", "input gradient", stage, stage + 1, micro_batch)
            self.give(rank, ("input gradient", *at))
            if action.kind is Kind.B:
                self.give(rank, ("left for W", *at, 0))

    def take(self, rank: int, name: str, of_neighbour: str, stage: int, neighbour: int, micro_batch: int) -> None:
        """What a neighbouring stage has made: on this rank, or received and gone then."""
        if neighbour in self.stages[rank]:
            self.need(rank, (of_neighbour, neighbour, micro_batch))
        else:
            self.need(rank, (name, stage, micro_batch, "came"))
            self.shelves[rank].remove((name, stage, micro_batch, "came"))

    def need(self, rank: int, value: tuple) -> None:
        if value not in self.shelves[rank]:
            raise Broken(f"no {value}")

    def give(self, rank: int, value: tuple) -> None:
        if value in self.shelves[rank]:
            raise Broken(f"{value} twice")
        self.shelves[rank].add(value)


def runs(programs: Programs, placement: Placement, communicator: Communicator) -> bool:
    try:
        for late in (False, True):
            Machine(programs, placement, communicator, late).run()
    except Broken:
        return False
    return True


def in_pieces(name: str, ranks: int, micro_batches: int) -> tuple[Programs, Placement]:
    """As `lowered`, each W in two pieces."""
    schedule = build(name, ranks, micro_batches)
    orders = tuple(tuple(piece for action in order for piece in (action.cut(2) if action.kind is Kind.W else (action,)))
                   for order in schedule.orders)
    return lower(schedule.with_orders(orders), Times.uniform(schedule.placement.stages)), schedule.placement


def mutant(programs: Programs, pick: random.Random) -> Programs:
    """One or two steps moved, swapped, dropped, doubled, given to another rank or to another micro-batch."""
    result = [list(program) for program in programs]
    for _ in range(pick.randint(1, 2)):
        program = pick.choice(result)
        place, other = pick.randrange(len(program)), pick.randrange(len(program))
        change = pick.choice(["move", "move", "nudge", "nudge", "swap", "drop", "double", "give", "rename"])
        if change == "move":
            program.insert(other, program.pop(place))
        elif change == "nudge":
            program.insert(max(0, place + pick.choice((-2, -1, 1, 2))), program.pop(place))
        elif change == "swap":
            program[place], program[other] = program[other], program[place]
        elif change == "drop" and len(program) > 1:
            del program[place]
        elif change == "double":
            program.insert(other, program[place])
        elif change == "give" and len(program) > 1:
            pick.choice(result).append(program.pop(place))
        elif change == "rename" and hasattr(program[place], "message"):
            program[place] = type(program[place])(program[place].message._replace(micro_batch=pick.randint(0, 1)))
    return tuple(tuple(program) for program in result)


def disagreements(seeds: range) -> tuple[list[tuple[int, str]], Counter[bool]]:
    """Mutants on which the checker and the machine disagree, and how many run."""
    differing, counts = [], Counter()
    for seed in seeds:
        pick = random.Random(seed)
        make = in_pieces if seed % 4 == 0 else lowered
        good, placement = make(pick.choice(sorted(SCHEDULES)), pick.randint(1, 3), pick.randint(1, 3))
        programs = mutant(good, pick)
        communicator = (own, of_the_direction)[seed % 2]
        said, run = verdict(programs, placement, communicator), runs(programs, placement, communicator)
        counts[run] += 1
        if (said == "good") != run:
            differing.append((seed, said))
    return differing, counts


def test_mutants_are_refused_exactly_if_they_cannot_run() -> None:
    differing, counts = disagreements(range(1500))
    assert not differing
    assert counts[True] > 200 and counts[False] > 800, counts


@pytest.mark.slow
def test_many_mutants() -> None:
    assert disagreements(range(1500, 20_000))[0] == []


def test_pieces_run_in_turn_behind_their_input_gradient() -> None:
    first, second = W(0, 0).cut(2)
    for order, message in (((F(0, 0), B(0, 0), second, first), r"rank 0 runs W0.0\[1/2\] before W0.0\[0/2\]"),
                           ((F(0, 0), BW(0, 0), W(0, 0)), "rank 0 runs W0.0 twice")):
        with pytest.raises(DeadlockError, match=message):
            check([tuple(Run(action) for action in order)], linear(1))


def test_large_programs_are_checked_quickly() -> None:
    programs, placement = lowered("v-half", 8, 64)
    start = time.process_time()
    check(programs, placement)
    assert time.process_time() - start < 1, "every rank does this when it starts"


def test_a_program_of_one_rank_needs_no_messages() -> None:
    check([(Run(F(0, 0)), Run(B(0, 0)))], linear(1))
