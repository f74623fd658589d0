"""Scripts that know DeepSpeed alone, run as they are and under ds_vshape.run, for tests of what such scripts do.

A script is a function of the ds_config that imports nothing but deepspeed and this module's helpers. Its variants run
one after another on the same forked ranks: DeepSpeed untouched, then with our names in DeepSpeed's place, without the
key and with each schedule.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines import micro_batch
from ranks import run_ranks

from ds_vshape import run
from ds_vshape.config.section import ENVIRONMENT_VARIABLE

UNTOUCHED, NO_KEY = "DeepSpeed", "no key"
SCHEDULES = ("zb-h1", "v-half", "v-zb")
BATCHES, MICRO_BATCHES = 3, 3

Script = Callable[[dict[str, Any]], Any]


def ds_config(schedule: Any = None, **keys: Any) -> dict[str, Any]:
    """What a script's config says; gradients are summed up as DeepSpeed does."""
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO_BATCHES,
              "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}, "gradient_clipping": 0.0,
              "steps_per_print": 1, **keys}
    config = {key: value for key, value in config.items() if value is not None}
    if schedule is None:
        return config
    section = schedule if isinstance(schedule, dict) else {"name": schedule}
    return {**config, "pipeline_schedule": {"gradient_accumulation_fusion": False, "timeout_seconds": 30, **section}}


def samples(engine: Any, batch: int, count: int = MICRO_BATCHES) -> list[Any]:
    """The micro-batches of a batch, for this rank's replica."""
    replica = engine.grid.get_data_parallel_rank()
    return [micro_batch(batch, number, replica) for number in range(count)]


def losses(engine: Any) -> list[float]:
    """Of some batches."""
    return [engine.train_batch(iter(samples(engine, batch))).item() for batch in range(BATCHES)]


def weights(engine: Any) -> dict[str, Any]:
    """All that this rank trains, by name."""
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


def run_variant(script: Script, schedule: Any, keys: dict[str, Any]) -> Any:
    """What the script returns, or the error that it ends with as text; in this process DeepSpeed's names are ours
    from now on, unless `schedule` is UNTOUCHED."""
    if schedule != UNTOUCHED:
        run.substitute()
    config = ds_config(None if schedule in (UNTOUCHED, NO_KEY) else schedule, **keys)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps(config))
        os.environ[ENVIRONMENT_VARIABLE] = str(path)
        try:
            return script(config)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def variants(script: Script, ranks: int = 2, schedules: Sequence[Any] = (UNTOUCHED, NO_KEY, *SCHEDULES),
             **keys: Any) -> dict[Any, list[Any]]:
    """By schedule, what the script returns on each rank; `keys` are the config's others. Ranks are forked once."""

    def on_rank(rank: int) -> list[Any]:
        return [run_variant(script, schedule, keys) for schedule in schedules]

    of_ranks = run_ranks(ranks, on_rank, timeout=150.0)
    named = [schedule if isinstance(schedule, str) else json.dumps(schedule) for schedule in schedules]
    return {name: list(results) for name, results in zip(named, zip(*of_ranks, strict=True), strict=True)}
