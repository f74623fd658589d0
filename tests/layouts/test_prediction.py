"""What a job is predicted to need and to take, against engines that run it and against the formulas of its schedule."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import pytest
from ranks import run_ranks
from train_rank import batches_of, build_engine

from ds_vshape.config.section import ConfigError
from ds_vshape.layouts.composition import compose_job
from ds_vshape.layouts.job import Job, Machine
from ds_vshape.layouts.job_costs import host_of, place_of, predict_job, training_of
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.schedule.communicators import COMMUNICATOR_BYTES
from ds_vshape.schedule.passes import Kind

SHAPE = ["model=tiny", "model.layers=6", "model.hidden=96", "model.heads=4", "model.length=96", "parallel.pipe=2",
         "data.micro_batches=4"]
JOBS = [
    ["schedule=v-half"],
    ["schedule=v-half", "parallel.zero=1"],
    ["schedule=zb-h1", "precision=bf16"],
    ["schedule=1f1b", "precision=bf16", "parallel.zero=1"],
    ["schedule=v-min", "precision=bf16_sums", "parallel.zero=1"],
    ["schedule=v-zb", "precision=bf16", "parallel.zero=1", "+schedule.optimizer_post_validation=true"],
    ["schedule=v-half", "parallel.zero=1", "+deepspeed.torch_autocast={enabled: true, dtype: bfloat16}"],
]


def run(rank: int, jobs: list[Job]) -> list[tuple[tuple[RankMemory, ...], list[int]]]:
    """What each engine reports that it needs after its second batch, and where its stages start."""
    found = []
    for job in jobs:
        engine = build_engine(job)
        training, _ = batches_of(job, 0)
        for _ in range(2):
            engine.train_batch(training)
        found.append((engine.memory_report(), list(engine.module.parts)))
    return found


def test_memory_and_stages_are_those_of_the_engine() -> None:
    """The model of costs leaves out norms and biases, which are few."""
    jobs = [compose_job([*SHAPE, *words]) for words in JOBS]
    for job, (measured, parts) in zip(jobs, run_ranks(2, run, jobs, timeout=300)[0], strict=True):
        predicted = predict_job(job)
        assert parts == predicted.training.partition
        for ours, theirs in zip(predicted.memory, measured, strict=True):
            assert ours.working == pytest.approx(theirs.working, rel=0.25), job.ds_config()
            # The process is for the engine to measure.
            expected = astuple(replace(theirs, working=ours.working, process=0))
            assert astuple(ours) == pytest.approx(expected, rel=0.06), job.ds_config()


def test_tensor_parallel_and_replicas_share_what_they_share() -> None:
    """Blocks are shared by tensor parallel ranks; embedding and head aren't; ZeRO-1's optimizer is by replicas."""
    def first_rank(*words: str) -> RankMemory:
        return predict_job(compose_job([*SHAPE, "parallel.zero=1", *words])).memory[0]

    alone, shared, replicated = first_rank(), first_rank("parallel.tensor=2"), first_rank("parallel.data=2")
    ends = 4 * (256 + 96) * 96  # the head is the embedding
    assert shared.parameters - ends == pytest.approx((alone.parameters - ends) / 2)
    assert (replicated.parameters, replicated.optimizer) == (alone.parameters, alone.optimizer / 2)
    assert replicated.activations_peak == alone.activations_peak


PLANNED = ["schedule=adaptive", "schedule.memory_limit=0.25", "schedule.planning_seconds=1", "parallel.pipe=4",
           "data.micro_batches=8", "machine=a100", "precision=bf16_sums", "parallel.zero=1"]


def test_copies_take_what_the_host_takes() -> None:
    """A batch that offloads is slower with a slower host, and what is copied is what forwards leave."""
    # So small that a tenth of this time is enough.
    words = [*PLANNED, "schedule.memory_limit=0.5", "schedule.planning_seconds=2", "parallel.pipe=2",
             "data.micro_batches=4", "schedule.offload=true"]
    fast, slow = (compose_job([*words, f"machine.host={host}"]) for host in (1000, 0.5))
    predicted = [predict_job(job) for job in (fast, slow)]
    assert predicted[0].timeline.makespan < 0.98 * predicted[1].timeline.makespan
    training = training_of(slow)
    times, sizes = training.times(slow.placement, training.speeds.inside), training.activations(slow.placement)
    assert times.offload == times.reload == tuple(size / 0.5e9 for size in sizes.after_forward)
    copies = [span for spans in predicted[1].timeline.offloads for span in spans]
    assert all(span.end - span.start == pytest.approx(times.offload[span.action.stage]) for span in copies)


def test_recomputation_leaves_the_inputs() -> None:
    """So it fits where no order alone does; C of the first layers takes their part of F."""
    words = [*PLANNED, "schedule.memory_limit=0.2"]
    with pytest.raises(ConfigError, match="schedule.memory_limit = 0.2: the least possible peak .* is 0.25 of"):
        compose_job(words)
    job = compose_job([*words, "schedule.recompute=true"])
    training = training_of(job)
    assert any(action.kind is Kind.C for _, action in predict_job(job).schedule.passes())
    times, sizes = training.times(job.placement, training.speeds.inside), training.activations(job.placement)
    for stage, (layers, left) in enumerate(zip(times.recompute, sizes.recomputed, strict=True)):
        assert layers[-1] == pytest.approx(times.forward[stage]) and list(layers) == sorted(layers)
        inputs = 0 if stage == 0 else 2 * training.tokens * training.shape.hidden
        assert left[-1] == pytest.approx(inputs)


def test_a_machine_says_how_fast_its_host_is_or_is_a_usual_one() -> None:
    machine = compose_job(PLANNED).machine.model_dump()
    assert machine.pop("host") == 12
    assert Machine(**machine).host == 10


@pytest.mark.parametrize("words", [["schedule=v-half"], ["schedule=1f1b"], ["schedule=v-zb", "parallel=three_d"]])
def test_the_step_is_work_and_bubble(words: list[str]) -> None:
    """Of equal blocks and nothing else: F, B and W of all micro-batches, over the share of time that isn't bubble."""
    job = compose_job([*words, "machine=a100", "precision=bf16_sums", "parallel.zero=1"])
    predicted, training = predict_job(job), training_of(job)
    times = training.times(job.placement, training.speeds.inside)
    work = job.micro_batches * sum(map(times.of_stage, range(job.placement.stages))) / job.parallel.pipe
    assert predicted.timeline.makespan == pytest.approx(work / (1 - predicted.bubble))
    assert predicted.seconds == predicted.timeline.makespan + training.reduction(job.placement)
    assert predicted.samples_per_second * predicted.seconds == pytest.approx(
        job.micro_batches * job.data.micro_batch * job.replicas)


def test_hops_are_slow_where_hosts_end() -> None:
    """Four pipeline ranks on hosts of two: only the messages between ranks 1 and 2 leave a host."""
    words = ["machine=a100", "precision=bf16", "parallel.zero=1", "schedule=1f1b", "machine.between=[20, 200000]"]
    near, split, far = (predict_job(compose_job([*words, f"machine.slots={slots}"])) for slots in (4, 2, 1))
    # A micro-batch alone crosses each link twice, down and up again.
    assert near.seconds < 0.01 < split.seconds < far.seconds
    one = [predict_job(compose_job([*words, f"machine.slots={slots}", "data.micro_batches=1"])).seconds
           for slots in (4, 2, 1)]
    latency = 0.2 - 20e-6
    assert one[1] - one[0] == pytest.approx(2 * latency, rel=1e-3)
    assert one[2] - one[0] == pytest.approx(6 * latency, rel=1e-3)


def test_places() -> None:
    """As DeepSpeed's topology numbers them: tensor parallel ranks are neighbours, pipeline ranks furthest apart."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    job = compose_job(["parallel=three_d", "parallel.data=3", "machine.slots=4"])
    topology = PipeModelDataParallelTopology(num_pp=2, num_dp=3, num_mp=2)
    for rank in range(job.ranks):
        where: Any = topology.get_coord(rank)
        assert place_of(job, where.pipe, where.data, where.model) == rank
        assert host_of(job, rank) == f"host {rank // 4}"


def test_communicators_of_messages_are_counted_on_gpus() -> None:
    """Eight ranks in each of 64 pipelines, without making any."""
    words = ["model=9.6b", "parallel.pipe=8", "parallel.data=64", "data.micro_batches=16", "schedule=v-half",
             "parallel.zero=1", "precision=bf16"]
    on_gpus = predict_job(compose_job([*words, "machine=a100"])).memory
    inner, outer = 4 * COMMUNICATOR_BYTES, 2 * COMMUNICATOR_BYTES
    assert [memory.communicators for memory in on_gpus] == [outer, *[inner] * 6, outer]
    # Activations are gone when DeepSpeed's bucket is there.
    assert on_gpus[1].total == sum(astuple(on_gpus[1])) - on_gpus[1].batch_end
