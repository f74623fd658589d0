"""Evaluates a batch: DeepSpeed's eval_batch (runtime/pipe/engine.py), whose arguments are the same on all ranks, and
whose error on one rank is one on all."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.engine.guard import BatchGuard
from ds_vshape.engine.plans import BatchPlan, Plans
from ds_vshape.health.failures import Agreement, is_known_to_all
from ds_vshape.health.preflight import Facts
from ds_vshape.health.watch import Watch
from ds_vshape.runtime.micro_batch import check_reduction


class Evaluation(StockEngine):
    """How a PipelineEngine evaluates; it has what is declared here."""

    data_iterator: Any
    monitor: Any
    outputs: Any
    _agreement: Agreement
    _doing: Callable[[str], Callable[[], str]]
    _guard: BatchGuard
    _plans: Plans
    _watch: Watch
    # Whether the loss of what is evaluated goes to all ranks, and to the monitor, as one number.
    _sends_loss = False

    def eval_batch(self, data_iter: Any, return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True,
                   num_micro_batches: int | None = None) -> Any:
        """Evaluate a batch, as DeepSpeed's `eval_batch`; training isn't disturbed, even if it raises.

        Raises on every rank, PreflightError where ranks give different arguments.
        """
        self._guard.check_ranks_agree()
        # DeepSpeed takes what is evaluated for a loss, which it reports.
        reports = self.monitor.enabled
        self.monitor.enabled = reports and compute_loss
        sends_loss = bool(compute_loss and (bcast_loss or self.monitor.enabled))

        def facts() -> Facts:
            check_reduction(reduce_output, sends_loss)
            if num_micro_batches is not None and not isinstance(num_micro_batches, Integral):
                raise PipelineError(f"num_micro_batches = {num_micro_batches!r}: must be a whole number, or None")
            number = self.micro_batches if num_micro_batches is None else int(num_micro_batches)
            return {"num_micro_batches": number, "compute_loss": bool(compute_loss), "bcast_loss": bool(bcast_loss),
                    "reduce_output": reduce_output}

        training_iterator = self.data_iterator
        try:
            with self._watch.phase(self._doing("eval_batch")):
                self.module.preflight.compare(facts)
                self._sends_loss = sends_loss
                return self._agreed(lambda: super(Evaluation, self).eval_batch(
                    data_iter, return_logits, compute_loss, reduce_output, bcast_loss, num_micro_batches))
        finally:
            self.data_iterator, self.monitor.enabled = training_iterator, reports
            self._sends_loss = self.eval_return_logits = False
            self.outputs = None

    def _agreed(self, evaluate: Callable[[], Any]) -> Any:
        """What `evaluate` gives; raises on all ranks if it has raised on one, or its monitor has."""
        result = failure = None
        try:
            result = evaluate()
        except Exception as error:
            if is_known_to_all(error):
                raise
            failure = self._agreement.failure(error, "eval_batch")
        deferred = self._guard.take_deferred()
        failure = failure or deferred
        with self._watch.failed(failure):
            self._agreement.reach(failure, "evaluation")
        return result

    def _inference_schedule(self, micro_batches: int) -> BatchPlan:
        return self._plans.evaluation(micro_batches)
