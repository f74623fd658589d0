"""`"verify_gradients": true`: whether the split backward computes the same gradients as a whole one for this model.

A split backward is right for all layers for which autograd is, provided that they keep two rules that a whole backward
doesn't require: what B leaves to W mustn't be overwritten, and both halves of a SplitFunction must be right.
So one early batch runs twice, from the same state, with the same data and the same random numbers:

    [1] with whole backwards        in the schedule's order, each B a BW and no W; nothing is split, reduced or stepped
    [2] the state is restored       batch_snapshot.py
    [3] as scheduled                the batch itself, as without the key
    [4] before a reduction          gradients of the stage are compared, and at the end all others and the losses
    [5] all ranks agree             training continues, with one line in the log; or the job ends on all ranks

It is the third batch. In the first, layers make caches and shapes are announced; in the second, activations are
measured, and a copy of all gradients would be among them. Where gradients aren't finite (a loss scale that is still too
high), or DeepSpeed's profiler counts the batch, it is a later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.utils import logger
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.config.section import KEY
from ds_vshape.engine.batch_snapshot import BatchSnapshot
from ds_vshape.engine.comparison import Difference, compare, tolerance, usual_size
from ds_vshape.engine.flops_profile import ProfiledRank, is_flops_profiled
from ds_vshape.engine.guard import BatchGuard
from ds_vshape.health.failures import Agreement, Failure
from ds_vshape.measure.observer import METERED_BATCH, Observer
from ds_vshape.module.pipeline_module import PipelineModule
from ds_vshape.runtime.gradient_release import ReleasedWeights
from ds_vshape.schedule.builders.fuse import with_whole_backwards
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule

# Good training batches before it.
VERIFIED_BATCH = METERED_BATCH + 1
_SHOWN = 5
_ADVICE = ("Look at the highest stage first, since lower ones get its gradients: for memory that a layer writes again "
           "while a weight gradient needs it, a backward hook that changes a gradient in place, a wrong "
           "backward_weight of a SplitFunction, a backward that depends on when it runs. \"1f1b-v\" and \"1f1b\" train "
           "with whole backwards")


class VerificationError(PipelineError):  # type: ignore[misc]
    """Losses or gradients aren't those of whole backwards."""


@dataclass(frozen=True)
class _Whole:
    """What the run with whole backwards has given on this rank."""

    gradients: dict[Parameter, Tensor | None]
    losses: list[Any]
    # Whether some rank has failed, and the failure of this one.
    failed: bool
    failure: Failure | None
    usual: float
    finite: bool


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others, in numbers: flags, how many gradients it has compared, how many of them are equal
    bit for bit, and the largest difference as a share of the gradient's norm."""

    batch_failed: bool
    whole_failed: bool
    infinite: bool
    differs: bool
    gradients: int
    exact: int
    worst: float

    def numbers(self) -> list[float]:
        """As a list."""
        return [float(value) for value in vars(self).values()]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> _Report:
        """From such a list."""
        batch_failed, whole_failed, infinite, differs, gradients, exact, worst = numbers
        return cls(bool(batch_failed), bool(whole_failed), bool(infinite), bool(differs), round(gradients),
                   round(exact), worst)


class VerifiedRank(ProfiledRank, Protocol):
    """A rank that can rehearse a batch (rehearsal.py); the dtypes of autocast are DeepSpeedEngine's."""

    module: PipelineModule
    micro_batches: int
    # The losses of the batch's micro-batches, on the rank that computes them.
    fwd_outputs: list[Any]

    def rehearsed(self, schedule: Schedule) -> AbstractContextManager[None]:
        """Runs the passes of the next batch by `schedule`; their results are there within the context."""

    def gradient_so_far(self, parameter: Parameter) -> Tensor | None:
        """What the batch has added up for a parameter."""

    def torch_autocast_enabled(self) -> bool:
        """Whether passes run under torch.autocast."""

    def torch_autocast_dtype(self) -> torch.dtype:
        """Its dtype."""


class Verification:
    """Verifies one batch.

    Args:
        rank: whose batches they are.
        agreement: of all ranks of the job.
        guard, observer, released: of this rank's batches.
    """

    def __init__(self, rank: VerifiedRank, agreement: Agreement, guard: BatchGuard, observer: Observer,
                 released: ReleasedWeights) -> None:
        self._rank, self._agreement, self._guard = rank, agreement, guard
        self._observer, self._released = observer, released
        self._whole: _Whole | None = None
        self._found: dict[Parameter, Difference] = {}
        self._done = False

    @property
    def is_due(self) -> bool:
        """Whether the next training batch is to be verified, the same on every rank."""
        return not self._done and self._observer.batches >= VERIFIED_BATCH and not is_flops_profiled(self._rank)

    def run_whole(self, schedule: Schedule) -> bool:
        """Run a batch with whole backwards and put all back; False if `schedule` splits none."""
        if not any(action.kind is Kind.W for _, action in schedule.passes()):
            self._done = True
            self._log(f"{KEY}.verify_gradients: {schedule.name} splits no backward, so there is nothing to verify")
            return False
        if any(hooked for hooked, in self._agreement.start_status([float(self._released.has_hooks)]).result()):
            self._done = True
            self._log(f"{KEY}.verify_gradients: hooks of the script's own run where gradients add up, and what they "
                      "do can't be put back, so nothing is verified")
            return False
        snapshot = BatchSnapshot(self._rank)
        with self._rank.rehearsed(with_whole_backwards(schedule)):
            failed = self._agreement.start_status([float(self._guard.failure is not None)]).result()
            self._whole = self._taken(snapshot, [1.0] in failed)
        snapshot.restore()
        return True

    def _taken(self, snapshot: BatchSnapshot, failed: bool) -> _Whole:
        """The losses and gradients of the run; gradients that `restore` would overwrite are copied."""
        if failed:
            return _Whole({}, [], True, self._guard.failure, 0.0, True)
        gradients = {}
        for parameter in self._rank.module.parameters():
            if parameter.requires_grad:
                gradient = self._rank.gradient_so_far(parameter)
                if gradient is not None and not snapshot.forgets(parameter, gradient):
                    gradient = gradient.clone()
                gradients[parameter] = gradient
        known = [gradient for gradient in gradients.values() if gradient is not None]
        finite = all(bool(_values(gradient).isfinite().all()) for gradient in known)
        return _Whole(gradients, list(self._rank.fwd_outputs), False, None, usual_size(known), finite)

    def compare(self, stage: int) -> None:
        """Compare the gradients of `stage`, except of weights that other stages use too."""
        module = self._rank.module
        of_stages = {chunk.stage: set(chunk.parameters()) for chunk in module.chunks}
        others = [weights for other, weights in of_stages.items() if other != stage]
        tied = {weight for weight, _ in module.get_tied_weights_and_groups()}
        self._compare(of_stages[stage].difference(tied, *others))

    @torch.no_grad()
    def _compare(self, parameters: Iterable[Parameter]) -> None:
        whole = self._whole
        if whole is None or self._guard.failure is not None:
            return
        for parameter in parameters:
            if parameter in whole.gradients:
                allowed = tolerance(self._dtype(parameter), self._rank.micro_batches)
                expected, found = whole.gradients.pop(parameter), self._rank.gradient_so_far(parameter)
                self._found[parameter] = compare(found, expected, allowed, whole.usual)

    def _dtype(self, parameter: Parameter) -> torch.dtype:
        """The coarsest dtype to which a gradient is rounded."""
        rank = self._rank
        return rank.torch_autocast_dtype() if rank.torch_autocast_enabled() else parameter.dtype

    def agree(self) -> None:
        """Compare the rest, and tell all ranks what was found (collective). Raises on all of them where one has found a
        difference; where the batch has failed, it's left to the batch to say so."""
        whole = self._whole
        if whole is None:
            return
        self._compare(list(whole.gradients))
        report, difference = self._report(whole)
        self._whole, self._found = None, {}
        reports = [_Report.of(numbers) for numbers in self._agreement.start_status(report.numbers()).result()]
        if any(rank.batch_failed for rank in reports):
            return
        if any(rank.whole_failed for rank in reports) or not any(rank.infinite for rank in reports) and (
                any(rank.differs for rank in reports)):
            if difference is not None:
                error = VerificationError(difference)
                self._guard.failure = self._agreement.failure(error, f"{KEY}.verify_gradients")
            self._guard.agree_on_passes()
        self._done = not any(rank.infinite for rank in reports)
        if self._done:
            self._log(self._line(reports))

    def _log(self, line: str) -> None:
        if self._rank.global_rank == 0:
            logger.info(line)

    def _report(self, whole: _Whole) -> tuple[_Report, str | None]:
        """This rank's report to the others, and a text about what differs."""
        failed = self._guard.failure is not None
        if failed or whole.failed:
            own = whole.failure is not None and not whole.failure.is_anothers
            text = f"the batch runs as scheduled, and fails with whole backwards: {whole.failure}" if own else None
            return _Report(failed, whole.failed, False, False, 0, 0, 0.0), text
        texts = [*self._differing_losses(whole.losses), *self._differing_gradients()]
        shares = [found.share for found in self._found.values()]
        report = _Report(False, False, not whole.finite, bool(texts), len(shares), shares.count(0.0),
                         max(shares, default=0.0))
        return report, f"{'; '.join(texts)}. {_ADVICE}" if texts else None

    def _differing_losses(self, whole: Sequence[Any]) -> Iterator[str]:
        pairs = list(zip(self._rank.fwd_outputs, whole, strict=True))
        differing = [pair for pair in pairs if not compare(*pair, tolerance(pair[0].dtype, 1)).is_close]
        if differing:
            found, expected = map(float, differing[0])
            yield (f"{len(differing)} of {len(pairs)} losses differ, the first is {found:.6g} as scheduled and "
                   f"{expected:.6g} with whole backwards: forwards depend on state that isn't put back between the "
                   "two, which is anything but buffers and plain attributes of modules")

    def _differing_gradients(self) -> Iterator[str]:
        module = self._rank.module
        differing = sorted(((found.share, parameter) for parameter, found in self._found.items() if not found.is_close),
                           key=lambda pair: pair[0], reverse=True)
        names = {parameter: name for name, parameter in module.named_parameters()}
        for share, parameter in differing[:_SHOWN]:
            stages = [str(chunk.stage) for chunk in module.chunks if parameter in set(chunk.parameters())]
            path = names[parameter].split(".")[:-1]
            layer = module.get_submodule(".".join(path[:2] if path[:1] == ["tied_modules"] else path[:1]))
            yield (f"the gradient of {names[parameter]} ({type(layer).__name__}, stage {' and '.join(stages)}) differs "
                   f"from that of whole backwards by {share:.2g} of its norm (tolerance "
                   f"{self._found[parameter].tolerance:.2g})")
        if len(differing) > _SHOWN:
            yield f"{len(differing) - _SHOWN} more of {len(self._found)} gradients differ"

    def _line(self, reports: Sequence[_Report]) -> str:
        gradients, exact = sum(rank.gradients for rank in reports), sum(rank.exact for rank in reports)
        rest = "" if exact == gradients else (
            f" for {exact} of them, and to within {max(rank.worst for rank in reports):.2g} of their norm for the rest")
        return (f"{KEY}.verify_gradients: in training batch {self._observer.batches + 1} the losses of "
                f"{self._rank.micro_batches} micro-batches and {gradients} gradients on {len(reports)} ranks are those "
                f"of whole backwards, bit for bit{rest}")


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor
