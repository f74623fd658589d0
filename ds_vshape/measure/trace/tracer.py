"""Traces the batches that the config names: records them, brings them together, writes the files.

    batches_10-12.trace.json    for ui.perfetto.dev and chrome://tracing    (ds_vshape/measure/trace/chrome.py)
    batches_10-12.html          a page of its own                           (ds_vshape/measure/trace/page.py)

The first pipeline alone is traced (data and tensor parallel rank 0); its rank 0 writes. Files are there after the first
traced batch already, and grow with each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed.utils import logger

from ds_vshape.comm.channels import Channels
from ds_vshape.comm.exchange import Exchange
from ds_vshape.config.section import TraceConfig
from ds_vshape.measure.observer import Observer
from ds_vshape.measure.profiling import mean_times
from ds_vshape.measure.trace.batch import BatchTrace, Clock, RankTrace, deliveries, measured
from ds_vshape.measure.trace.chrome import chrome_trace
from ds_vshape.measure.trace.clocks import clocks, refined
from ds_vshape.measure.trace.page import page
from ds_vshape.measure.trace.recorder import Recorder
from ds_vshape.runtime.rank import TrainingRank
from ds_vshape.runtime.wrappers import InstructionWrappers
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.timeline import simulate


class Tracer:
    """Traces the batches of this `rank` that `config` names. Creating it is collective over the job."""

    def __init__(self, rank: TrainingRank, observer: Observer, channels: Channels, wrappers: InstructionWrappers,
                 config: TraceConfig) -> None:
        self._rank, self._observer, self._channels, self._wrappers = rank, observer, channels, wrappers
        self._first, self._last = config.batches
        self._stem = os.path.join(config.path, f"batches_{self._first}-{self._last}")
        ranks: list[int] = next(ranks for ranks in rank.grid.pipe_groups if 0 in ranks)
        self._concerned = rank.global_rank in ranks
        self._exchange = Exchange(ranks)
        self._batches: list[BatchTrace] = []

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around a training batch, on every rank."""
        number = self._rank.global_steps + 1
        if not self._concerned or not self._first <= number <= self._last:
            yield
            return
        found = clocks(self._exchange.ranks, self._exchange.group)
        recorder = Recorder(self._channels)
        try:
            with self._wrappers.during(recorder.recorded):
                yield
        finally:
            recorder.close()
        copies = self._observer.last_batch()[1].copies_on_host()
        texts = self._exchange.texts_on_first(recorder.trace(copies).text())
        activations, unit = self._activations()
        if texts:
            self._batches.append(self._put_together(number, texts, found, activations, unit))
            self._write()

    def _activations(self) -> tuple[Activations, str]:
        """Bytes where they are measured already, and known."""
        measured = self._observer.activations() if self._observer.is_measured else None
        if measured is not None:
            return measured, "bytes"
        return Activations.counted(self._rank.placement), "activations"

    def _put_together(self, number: int, texts: list[str], found: tuple[Clock, ...], activations: Activations,
                      unit: str) -> BatchTrace:
        schedule = self._observer.last_batch()[0]
        own = [RankTrace.parse(text) for text in texts]
        agreed = refined(found, deliveries(own, schedule.placement))
        ranks = BatchTrace.aligned(own, agreed)
        planned = self._rank.planned_times
        times = planned or mean_times(measured(ranks), schedule.placement.stages)
        times_of = "the times it was planned for" if planned else "this batch's mean times"
        return BatchTrace(number, schedule, ranks, agreed, simulate(schedule, times), times_of, activations, unit)

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            _replace(f"{self._stem}.trace.json", json.dumps(chrome_trace(self._batches)))
            _replace(f"{self._stem}.html", page(self._batches))
        except OSError as error:
            # A full disk must not end a training.
            logger.warning(f"the trace can't be written: {error}")
            return
        logger.info(f"trace of batch {self._batches[-1].number}: {self._stem}.html, {self._stem}.trace.json (for "
                    f"ui.perfetto.dev); written in {time.perf_counter() - began:.2f} s")


def _replace(path: str, text: str) -> None:
    """Write all of a file or nothing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(target)
