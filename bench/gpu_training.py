"""Steps of gpu.py with an engine, on one rank or several. Each function runs on every rank, of which each has a process
of its own, and returns what this rank has measured."""

from __future__ import annotations

import hashlib
import os
import signal
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import engine_of
from deepspeed.accelerator import get_accelerator
from workloads import Gpt

CONFIG: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "data_types": {"grad_accum_dtype": "fp32"},
    # torch's own: DeepSpeed's would be compiled first.
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
}
# The first batches load kernels, and measure one micro-batch's activations.
_WARM_UP = 3
# The batch after which a checkpoint is saved, and that in which a rank ends.
_SAVED, _KILLED = 2, 2


def train(schedule: str, gpt: dict[str, int], batches: int) -> dict[str, Any]:
    """Losses of `batches` batches, the time of one beside the simulated one, the peak of memory beside the predicted
    one, and where the host waits for the device in a batch."""
    workload = Gpt(dist.get_world_size(), **gpt)
    engine = engine_of(schedule, workload, "equal", **CONFIG)
    losses, seconds, simulated = [], [], []
    for number in range(batches):
        before = _reset_peak()
        dist.barrier()
        start = time.perf_counter()
        losses.append(float(engine.train_batch(iter(workload.batch(number)))))
        get_accelerator().synchronize()
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - start)
            simulated.append(workload.simulated(engine))
    report = engine.pipeline_report()
    memory = engine.memory_report()[dist.get_rank()]
    measured = {"losses": losses, "seconds": seconds, "tokens_per_second": workload.tokens / statistics.median(seconds),
                "over_simulated": statistics.median(took / least for took, least in zip(seconds, simulated)),
                "predicted_bubble": report["predicted_bubble"], "measured_bubble": report["measured_bubble"],
                "predicted_bytes": (memory.activations_peak or 0) + (memory.working or 0),
                "predicted_total": memory.total}
    if _on_gpu():
        measured["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        measured["peak_total"] = torch.cuda.max_memory_allocated()
        measured["waits"] = waits(engine, workload.batch(batches))
    return measured


def _on_gpu() -> bool:
    """Whether this trains on a GPU, and not on the CPU of a machine that has one."""
    return bool(get_accelerator().device_name() == "cuda")


def _reset_peak() -> int:
    """The bytes that are allocated; the peak counts from here."""
    if not _on_gpu():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def waits(engine: Any, batch: Any) -> dict[str, int]:
    """Places in Python that made the host wait for the device in a batch, with their number."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.train_batch(iter(batch))
    torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught
                        if "synchronizing" in str(warning.message)))


def _repeatable() -> None:
    """Let torch's own operators give the same bits each time: the backward of its fused attention adds in any order
    else. To be called before the first of them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def first_run(schedule: str, gpt: dict[str, int], batches: int, folder: str) -> dict[str, Any]:
    """Losses and weights, with a checkpoint on the way."""
    _repeatable()
    workload = Gpt(dist.get_world_size(), **gpt)
    return _run(engine_of(schedule, workload, "equal", **CONFIG), workload, range(batches), folder)


def same_again(schedule: str, gpt: dict[str, int], batches: int, folder: str, first: dict[str, Any]) -> dict[str, Any]:
    """The same from the start, and from the checkpoint in `folder`; RuntimeError unless both end with the same bits as
    `first`."""
    _repeatable()
    workload = Gpt(dist.get_world_size(), **gpt)
    again = _run(engine_of(schedule, workload, "equal", **CONFIG), workload, range(batches))
    if again != first:
        raise RuntimeError(f"a second run differs from the first: {again} instead of {first}")
    engine = engine_of(schedule, workload, "equal", **CONFIG)
    engine.load_checkpoint(folder)
    rest = range(_SAVED + 1, batches)
    resumed = _run(engine, workload, rest)
    if resumed["losses"] != first["losses"][rest.start:] or resumed["weights"] != first["weights"]:
        raise RuntimeError(f"a run that goes on from batch {rest.start} differs: {resumed} instead of {first}")
    return {"equal": True}


def _run(engine: Any, workload: Gpt, batches: range, folder: str | None = None) -> dict[str, Any]:
    losses = []
    for number in batches:
        losses.append(float(engine.train_batch(iter(workload.batch(number)))))
        if number == _SAVED and folder is not None:
            engine.save_checkpoint(folder)
    digest = hashlib.sha256()
    for name, value in sorted(engine.module.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"losses": losses, "weights": digest.hexdigest()}


def links(device: str, size: int, times: int) -> dict[str, Any]:
    """An all-reduce of all ranks; then each rank sends the next one small messages and messages of `size` bytes, and
    gets them back."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    if total.item() != world:
        raise RuntimeError(f"an all-reduce of ones over {world} ranks gave {total.item()}")
    measured = {}
    for source in range(world):
        target = (source + 1) % world
        for name, count in (("small", 1), ("large", size // 4)):
            dist.barrier()
            if rank in (source, target):
                seconds = _round_trip(torch.full((count,), float(source), device=device), source, target, times)
                measured[f"{source} to {target}, {name}"] = seconds / 2
    return {"seconds": measured, "large_bytes": size}


def _round_trip(tensor: torch.Tensor, source: int, target: int, times: int) -> float:
    """Median seconds of a message there and back."""
    seconds = []
    for _ in range(times + 1):
        get_accelerator().synchronize()
        start = time.perf_counter()
        if dist.get_rank() == source:
            dist.send(tensor, target)
            dist.recv(tensor, target)
        else:
            tensor.fill_(torch.nan)
            dist.recv(tensor, source)
            dist.send(tensor, source)
        get_accelerator().synchronize()
        seconds.append(time.perf_counter() - start)
        if not bool((tensor == source).all()):
            raise RuntimeError(f"what rank {source} sent to rank {target} came back as {tensor[:4].tolist()}...")
    return statistics.median(seconds[1:])


def killed(schedule: str, gpt: dict[str, int], timeout_seconds: float) -> dict[str, Any]:
    """The last rank is killed in the middle of a batch; nobody comes to the end of this."""
    workload = Gpt(dist.get_world_size(), **gpt)
    section = {"name": schedule, "timeout_seconds": timeout_seconds}
    engine = engine_of(schedule, workload, **CONFIG, pipeline_schedule=section)
    forwards = 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal forwards
        forwards += engine.global_steps == _KILLED
        if forwards > workload.micro_batches and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.nn.modules.module.register_module_forward_pre_hook(count)
    for number in range(_KILLED + 2):
        engine.train_batch(iter(workload.batch(number)))
    raise RuntimeError("all batches were trained without the last rank")
