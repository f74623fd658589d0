"""What a training shows of itself, on one rank: a bar in a terminal, lines in a log, numbers in the engine's monitors.

Monitors of the ds_config (wandb, TensorBoard and others) get, over samples as from DeepSpeed:

    Train/Samples/train_loss, lr            each batch, by DeepSpeed
    Train/Samples/eval_loss                 each evaluation, by DeepSpeed
    Train/Finetuning/tokens_per_second      each batch: of all replicas, without padding
    Train/Finetuning/gradient_norm          each batch, where the engine knows it: with clipping, with ZeRO or in bf16
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

_PREFIX = "Train/Finetuning/"


class Progress:
    """Shows the training of an engine from its present batch to the batch `last`; rank 0 alone shows anything.

    Tokens are those of all replicas, without padding. The bar is there where the output is a terminal.
    """

    def __init__(self, engine: Any, last: int) -> None:
        self._engine = engine
        self._shows = dist.get_rank() == 0
        self._tokens = 0
        self._start = time.perf_counter()
        self._bar = tqdm(desc="training", unit="batch", initial=engine.global_steps, total=last, dynamic_ncols=True,
                         disable=None if self._shows else True)
        self._shown: dict[str, str] = {}

    @property
    def tokens_per_second(self) -> float:
        """Since the start, with evaluations and checkpoints."""
        return self._tokens / (time.perf_counter() - self._start)

    def batch(self, loss: float, tokens: int, seconds: float) -> None:
        """After a batch of so many tokens."""
        self._tokens += tokens
        self._shown.update({"loss": f"{loss:.3f}", "tokens/s": f"{self.tokens_per_second:.0f}"})
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()
        values = {_PREFIX + "tokens_per_second": tokens / seconds}
        norm = self._engine.get_global_grad_norm()
        if norm is not None and math.isfinite(norm):
            values[_PREFIX + "gradient_norm"] = float(norm)
        self._report(values)

    def measured(self, values: Mapping[str, float]) -> None:
        """What a loss function has measured besides, of a batch or of an evaluation."""
        self._shown.update({name: f"{value:.3f}" for name, value in values.items()})
        self._report({f"Train/Samples/{name}": value for name, value in values.items()})

    def evaluated(self, loss: float) -> None:
        """After an evaluation."""
        self._shown["evaluation"] = f"{loss:.3f}"
        self._bar.set_postfix(self._shown)
        self.tell(f"evaluation {loss:.4f}")

    def tell(self, what: str) -> None:
        """A line of the log, on what follows the present batch."""
        if self._shows:
            with tqdm.external_write_mode(file=sys.stdout):
                print(f"batch {self._engine.global_steps} of {self._bar.total}: {what}", flush=True)

    def _report(self, values: Mapping[str, float]) -> None:
        monitor, samples = self._engine.monitor, self._engine.global_samples
        if self._shows and monitor.enabled:
            monitor.write_events([(name, value, samples) for name, value in values.items()])

    def close(self) -> None:
        """At the end."""
        self._bar.close()
