"""A job as the cost model sees it: how its layers are cut into stages, and what its batch will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from ds_vshape.config.section import ScheduleConfig
from ds_vshape.layouts.gpt_costs import ENDS, GPT_PY, Bytes, Shape, Speeds, TrainingCosts
from ds_vshape.layouts.job import Job, in_terms_of_jobs
from ds_vshape.layouts.prediction import Prediction, predict
from ds_vshape.schedule.communicators import COMMUNICATOR_BYTES
from ds_vshape.schedule.timeline import Times


# DeepSpeed's default, in numbers (reduce_bucket_size).
_BUCKET = 5 * 10**8


def training_of(job: Job) -> TrainingCosts:
    """What the cost model takes; stages are balanced by it unless the config has bounds."""
    model = job.model
    shape = Shape("", model.layers, model.heads, model.hidden, job.ranks, model.vocabulary)
    training = TrainingCosts(shape, speeds_of(job), model.length, job.data.micro_batch, job.micro_batches,
                        job.parallel.pipe, job.parallel.tensor, job.replicas, bytes=bytes_of(job), code=GPT_PY)
    if job.section and isinstance(job.section.partition, tuple):
        first, *inner, last = job.section.partition
        return replace(training, bounds=(first, *(bound - 1 for bound in inner), last - ENDS))
    return training.balanced(job.placement)


def bytes_of(job: Job) -> Bytes:
    """What DeepSpeed's optimizer for that precision and that stage of ZeRO keeps of a parameter.

        dtype        ZeRO   sums              weight   gradient   optimizer
        fp32         0      -                 4        4          two moments
        fp32         1      fp32              4        4          weight and moments, shared
        bf16         0      bf16              2        2          fp32 weight and moments, shared
        bf16         1      fp32              2        4          fp32 weight and moments, shared
        bf16, fp16   1      same              2        2          fp32 weight and moments, shared
        others       1      another dtype     its own  its own + that of the sums    the same, shared

    BF16_Optimizer, in the second and third row, has a gradient in `.grad` within a backward only. The others of ZeRO
    step by flat copies in fp32, and move gradients into a bucket before.

    Messages have communicators in the memory of GPUs, but for those of DeepSpeed's own engine.
    """
    on_gpu = job.machine.accelerator == "cuda"
    communicator = COMMUNICATOR_BYTES if job.section is not None and on_gpu else 0
    # Of the second moments: their roots, and on a host, where they aren't divided in place, the quotients.
    temporary = 4 if on_gpu else 8
    size = {"fp32": 4, "bf16": 2, "fp16": 2}
    own, zero = size[job.precision.dtype], job.parallel.zero
    if job.precision.dtype == "fp32" and not zero:
        return Bytes(own, own, own, 8, False, communicator, temporary=temporary, one_by_one=not on_gpu)
    kind = job.precision.sums or job.precision.dtype
    in_sums_alone = kind == job.precision.dtype or (job.precision.dtype, kind) == ("bf16", "fp32")
    made = Bytes(own, own, size[kind] if in_sums_alone else own + size[kind], 12, communicator=communicator,
                 temporary=temporary)
    if job.precision.dtype == "bf16" and (not zero or kind == "fp32"):
        return made
    return replace(made, copying=size[kind] + (4 if size[kind] < 4 else 0),
                   bucket=_BUCKET * size[kind] if on_gpu else 0)


def predict_job(job: Job, progress: Callable[[float], None] = lambda fraction: None) -> Prediction:
    """The batch of `job`; raises ValueError as prediction.predict does."""
    training = training_of(job)
    if job.autocast is not None:
        from ds_vshape.layouts.measured import measured_gpt  # needs torch
        training = measured_gpt(job, training)
    return predict_training(job, training, progress)


def predict_training(job: Job, training: TrainingCosts,
                     progress: Callable[[float], None] = lambda fraction: None) -> Prediction:
    """The batch of `job`, with the layers and stages of `training`; raises ValueError as prediction.predict does."""
    config = job.section or ScheduleConfig(name=job.schedule_name)
    with in_terms_of_jobs():
        return predict(config, training, _times(job, training), progress)


def place_of(job: Job, pipe: int, data: int, tensor: int) -> int:
    """The global rank, as in DeepSpeed's PipeModelDataParallelTopology."""
    return (pipe * job.replicas + data) * job.parallel.tensor + tensor


def host_of(job: Job, rank: int) -> str:
    """The name of the host that has the global `rank`."""
    for host in job.hosts:
        if rank < host.slots:
            return host.name
        rank -= host.slots
    raise ValueError(f"rank {rank} is on no host")


def _times(job: Job, training: TrainingCosts) -> Times:
    """Each hop as its two ranks stand: the slowest replica's counts."""
    placement, speeds = job.placement, training.speeds
    inside, between = (training.times(placement, message) for message in (speeds.inside, speeds.between))

    def crosses_hosts(here: int, there: int) -> bool:
        return any(host_of(job, place_of(job, here, data, tensor)) != host_of(job, place_of(job, there, data, tensor))
                   for data in range(job.replicas) for tensor in range(job.parallel.tensor))

    ranks = map(placement.rank_of, range(placement.stages))
    return replace(inside, hops=tuple((between if crosses_hosts(here, there) else inside).hops[stage]
                                      for stage, (here, there) in enumerate(pairwise(ranks))))


def speeds_of(job: Job) -> Speeds:
    """What the job's machine reaches."""
    machine = job.machine
    inside, between = ((bandwidth * 1e9, microseconds * 1e-6)
                       for bandwidth, microseconds in (machine.inside, machine.between))
    # Nothing is reduced between hosts where there is one.
    return Speeds(machine.teraflops[job.autocast or job.precision.dtype] * 1e12, machine.efficiency, inside,
                   between if len(job.hosts) > 1 else inside, machine.host * 1e9)
