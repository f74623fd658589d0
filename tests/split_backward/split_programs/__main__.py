"""python -m split_programs [--programs N] [--seed S] [--processes P] [--seconds T], or for one
python -m split_programs --program 'Program(...)'

With tests/split_backward in PYTHONPATH. Says what ran; ends with 1 and a small program if the split isn't plain
autograd's.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from split_programs.campaign import Tally, campaign, prepare_process
from split_programs.program import evaluate
from split_programs.run import check


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m split_programs", description=__doc__)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to end at the latest")
    parser.add_argument("--program", help="one program, as it was printed")
    given = parser.parse_args()
    if given.program:
        outcome = check(evaluate(given.program))
        print(f"equal; {outcome.entries} entries waited for W")
        return 0
    share = -(-given.programs // given.processes)
    with ProcessPoolExecutor(given.processes, get_context("fork"), prepare_process) as pool:
        seeds = [given.seed + number for number in range(given.processes)]
        tally = sum(pool.map(campaign, [share] * given.processes, seeds, [given.seconds] * given.processes),
                    Tally())
    print(f"{tally.programs} programs in {tally.seconds:.0f} s; {tally.compared} with an oracle, {tally.deferring} of "
          f"them deferred something: {tally.entries} entries")
    print("steps: " + ", ".join(f"{kind} {count}" for kind, count in tally.steps.most_common()))
    for reason, count in tally.invalid.most_common(8):
        print(f"without an oracle: {count} {reason}")
    if tally.fault:
        print(f"FAULT {tally.fault}")
    return 1 if tally.fault else 0


if __name__ == "__main__":
    sys.exit(main())
