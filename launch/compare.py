"""Compares runs of the main job: first the losses, then one table; exits with 1 if the losses differ.

    python launch/compare.py runs/quickstart/deepspeed.json runs/quickstart/v-half.json ...

The first result is the reference. The losses of all batches must agree to LOSS_TOLERANCE: where a schedule places the
first and the last stage on one rank, the two gradients of the tied embedding are added in another order, and the
optimizer carries the rounding on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from result import JobResult
from rich.console import Console
from rich.table import Table

LOSS_TOLERANCE = 1e-5


def largest_difference(result: JobResult, reference: JobResult) -> float:
    """The largest relative difference of two runs' losses, validation included."""
    if len(result.losses) != len(reference.losses):
        raise ValueError(f"{result.schedule} ran {len(result.losses)} batches, "
                         f"{reference.schedule} {len(reference.losses)}")
    pairs = zip([*result.losses, result.validation_loss], [*reference.losses, reference.validation_loss], strict=True)
    return max(_difference(loss, expected) for loss, expected in pairs)


def _difference(loss: float, expected: float) -> float:
    difference = abs(loss - expected) / abs(expected)
    return difference if difference == difference else float("inf")  # A NaN is no agreement.


def table(results: list[JobResult]) -> Table:
    reference = results[0]
    view = Table(title=f"{reference.stages} ranks, {reference.micro_batches} micro-batches, "
                       f"{len(reference.losses)} batches",
                 caption="differs by: the largest relative difference of any batch's loss from the first row's. "
                         "Times and bubbles: medians over the batches; predicted: simulated with the passes' mean "
                         f"times. Peak activations: each rank's, in 1/{2 * reference.stages} of the model for one "
                         "micro-batch.")
    view.add_column("schedule", no_wrap=True)
    for column in ("loss", "differs by", "validation", "s a batch", "predicted\nbubble", "measured\nbubble",
                   "peak\nactivations"):
        view.add_column(column, justify="right", no_wrap=True)
    for result in results:
        view.add_row(result.schedule, f"{result.loss:.6f}", f"{largest_difference(result, reference):.1e}",
                     f"{result.validation_loss:.6f}", f"{result.batch_seconds:.3f}", f"{result.predicted_bubble:.1%}",
                     f"{result.measured_bubble:.1%}", " ".join(map(str, result.peak_activations)))
    return view


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    results = [JobResult.read(path) for path in parser.parse_args().results]
    Console(width=120).print(table(results))
    wrong = [result.schedule for result in results if largest_difference(result, results[0]) > LOSS_TOLERANCE]
    if wrong:
        print(f"Losses differ from {results[0].schedule}'s by more than {LOSS_TOLERANCE:g}: {', '.join(wrong)}",
              file=sys.stderr)
        return 1
    print(f"All losses agree to {LOSS_TOLERANCE:g} (relative), in every batch.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
