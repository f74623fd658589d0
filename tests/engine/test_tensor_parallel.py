"""Pipeline x data x tensor parallel with ZeRO-1, on DeepSpeed's own tensor parallel layers, against the plain model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from internals import count_rollbacks, wrap_accumulator, wrap_split_weights
from parallel_pipelines import DATA, MODEL, PIPE, TENSOR, parallel_engine
from pipelines import (BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job, Outcome, PlainTraining, data,
                       train)
from ranks import RanksFailed, run_ranks

import ds_vshape
import ds_vshape.split_backward.tensor_parallel
from ds_vshape.comm.channels import PeerLost
from ds_vshape.health import failures
from ds_vshape.models.gpt import GPTConfig, gpt_layers
from ds_vshape.models.gpt_parallel import ParallelBlock
from ds_vshape.models.parallel_layers import tensor_group
from ds_vshape.split_backward import WeightGradientStore

BATCHES = range(4)


def train_parallel(rank: int, job: Job) -> tuple[list[float], float, float]:
    engine = parallel_engine(job, DATA, "type:Block")
    late: set[Any] = set()
    wrap_split_weights(engine, lambda store: late.update(store.parameters()))
    losses = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
    in_w = {".".join(name.split(".")[1:]) for name, parameter in engine.module.named_parameters()
            if parameter in late}
    of_blocks = {"query_key_value.weight", "attention_out.weight", "mlp_in.weight", "mlp_out.weight"}
    assert in_w & of_blocks == (set() if job.schedule == "1f1b" else of_blocks)
    return losses, float(engine.get_global_grad_norm()), float(engine.eval_batch(data(engine, 9)))


@pytest.mark.quick_cases("v-half-zero1")
@pytest.mark.parametrize("config", [FP32, FP32_ZERO1], ids=["zero0", "zero1"])
@pytest.mark.parametrize("schedule", ["1f1b", "v-half", "v-zb"])
def test_equals_the_plain_model(schedule: str, config: dict[str, Any]) -> None:
    """Partial products add up in another order: equal to rounding. The clip acts, so the norm must be right."""
    job = Job(schedule, PIPE, 3, {**config, "gradient_clipping": 0.5}, tuple(gpt_layers(MODEL)))
    results = run_ranks(PIPE * DATA * TENSOR, train_parallel, job)
    plain = PlainTraining(job, DATA, clip=0.5)
    oracle: Outcome = plain.train(BATCHES, 3)
    assert plain.last_norm > 0.5
    for losses, norm, evaluated in results:
        assert losses == pytest.approx(oracle.losses, rel=1e-5)
        assert norm == pytest.approx(plain.last_norm, rel=1e-4)
        assert evaluated == pytest.approx(results[0][2], rel=1e-6)


PRECISIONS = {"bf16, ZeRO-0": BF16_ZERO0, "bf16, ZeRO-1": BF16_ZERO1, "bf16, ZeRO-1, sums in fp32": BF16_ZERO1_FP32,
              "fp16, ZeRO-1": {"fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 1}}}


def train_in_precisions(rank: int, jobs: list[Job], whole: bool) -> list[tuple[list[float], float]]:
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    results = []
    for job in jobs:
        engine = job.engine() if whole else parallel_engine(job, 1, "uniform")
        losses = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
        results.append((losses, float(engine.get_global_grad_norm())))
    return results


@pytest.mark.slow
def test_low_precisions() -> None:
    """Against DeepSpeed's engine on one rank. Uniformly cut, a V's rank 0 has no tensor parallel layer at all: nothing
    that its second tensor parallel rank would count in the norm."""
    layers = tuple(gpt_layers(MODEL))
    whole, ours = ([Job(schedule, stages, 3, {**config, "gradient_clipping": 0.5}, layers)
                    for config in PRECISIONS.values()] for schedule, stages in ((None, 1), ("v-half", PIPE)))
    oracles, = run_ranks(1, train_in_precisions, whole, True)
    for of_rank in run_ranks(PIPE * TENSOR, train_in_precisions, ours, False):
        for name, (losses, norm), (expected, expected_norm) in zip(PRECISIONS, of_rank, oracles, strict=True):
            assert expected_norm > 0.5
            assert losses == pytest.approx(expected, rel=2e-4), name
            assert norm == pytest.approx(expected_norm, rel=5e-3), name


def train_twice(rank: int, job: Job) -> list[tuple[list[float], Any, int]]:
    """Without and with post-validation: the losses, the weights, and how many steps were taken back."""
    found = []
    for section in ({"name": job.schedule}, {"name": job.schedule, "optimizer_post_validation": True}):
        engine = parallel_engine(replace(job, schedule=section), 1, "type:Block")
        redone = count_rollbacks(engine) if "optimizer_post_validation" in section else [0]
        losses = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
        found.append((losses, engine.module.state_dict(), redone[0]))
    return found


def test_steps_that_are_validated_later() -> None:
    """All tensor parallel ranks of all stages reach one verdict, clipped now and then."""
    job = Job("v-zb", PIPE, 3, {**FP32_ZERO1, "gradient_clipping": 1.2}, tuple(gpt_layers(MODEL)))
    for (expected, weights, _), (losses, later, redone) in run_ranks(PIPE * TENSOR, train_twice, job):
        assert losses == expected
        assert 0 < redone < len(BATCHES), redone
        assert all(torch.equal(later[name], weight) for name, weight in weights.items())


def test_heads_that_the_ranks_cannot_share_are_refused() -> None:
    def body(rank: int) -> None:
        topology = PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)
        ParallelBlock(GPTConfig(layers=1, hidden=9, heads=3, length=4), tensor_group(topology))

    with pytest.raises(RanksFailed, match="heads = 3 must be a multiple of the 2 tensor parallel ranks"):
        run_ranks(2, body)


def raise_in(number: int) -> None:
    """Let the forward `number` of a parallel block from now on raise, before it talks with its like."""
    forward, left = ParallelBlock.forward, number

    def fail(self: Any, x: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise ZeroDivisionError("a layer had enough")
        return forward(self, x)

    ParallelBlock.forward = fail  # type: ignore[method-assign]


def train_through(rank: int, job: Job, victims: list[int]) -> tuple[list[float], str]:
    failures.PEERS_SECONDS = 2.0
    engine = parallel_engine(job, 1, "parameters")
    losses = [float(engine.train_batch(data(engine, 0)))]
    if rank in victims:
        raise_in(3)
    told = "nothing"
    try:
        engine.train_batch(data(engine, 1))
    except PeerLost:
        raise
    except Exception as error:
        told = str(error)
    return losses + [float(engine.train_batch(data(engine, batch))) for batch in (1, 2)], told


@pytest.mark.parametrize("victims", [[2, 3], [0, 1, 2, 3]])
def test_ranks_that_share_a_layer_fail_together(victims: list[int]) -> None:
    """And train on together, as a job in which nothing failed."""
    job = Job("v-half", PIPE, 3, FP32_ZERO1, tuple(gpt_layers(MODEL)))
    oracle = PlainTraining(job).train(range(3), 3).losses
    for losses, told in run_ranks(PIPE * TENSOR, train_through, job, victims):
        assert losses == pytest.approx(oracle, rel=1e-5)
        assert "a layer had enough" in told


@pytest.mark.slow
def test_a_rank_that_fails_alone_in_a_shared_layer() -> None:
    """The others would wait for it inside the layer as long as torch lets them; the job ends instead, and says why."""
    with pytest.raises(RanksFailed) as failed:
        run_ranks(PIPE * TENSOR, train_through, Job("v-half", PIPE, 3, FP32_ZERO1), [2], timeout=60)
    told = str(failed.value)
    assert all(f"rank {rank}:" in told for rank in range(4)) and "was still running" not in told
    assert "ZeroDivisionError: a layer had enough. Not all of the ranks 2, 3 failed, which share their layers" in told


class Works:
    """Counts what runs between the start and the end of sums over tensor parallel ranks."""

    def __init__(self, engine: Any) -> None:
        self.sums = self.overlapped = 0
        self._open = 0
        reduce = torch.distributed.all_reduce

        def add(parameter: Any, gradient: Any, deliver: Any) -> None:
            self.overlapped += self._open
            deliver(parameter, gradient)

        def started(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            work = reduce(tensor, *args, **kwargs)
            if not kwargs.get("async_op"):
                return work
            self.sums += 1
            self._open = 1

            def wait() -> None:
                work.wait()
                self._open = 0

            return SimpleNamespace(wait=wait)

        wrap_accumulator(engine, add)
        ds_vshape.split_backward.tensor_parallel.dist.all_reduce = started


def train_beside(rank: int, overlapping: bool) -> tuple[Outcome, int, int]:
    if not overlapping:
        WeightGradientStore.meanwhile = property(lambda store: lambda: None, lambda store, value: None)
    engine = parallel_engine(Job("v-zb", PIPE, 4, FP32_ZERO1, tuple(gpt_layers(MODEL))), 1, "uniform")
    works = Works(engine)
    return train(engine, BATCHES), works.sums, works.overlapped


@pytest.mark.slow
def test_sums_of_input_gradients_run_beside_weight_gradients() -> None:
    """Which changes no bit of the weights."""
    with_overlap, without = (run_ranks(PIPE * TENSOR, train_beside, overlapping) for overlapping in (True, False))
    assert sum(overlapped for _, _, overlapped in without) == 0
    for (outcome, sums, overlapped), (expected, sums_too, _) in zip(with_overlap, without, strict=True):
        assert sums == sums_too
        # The first B of a batch finds nothing that waits.
        assert sums == 0 or overlapped > sums / 2
        assert outcome.losses == expected.losses
        for name, weight in expected.weights.items():
            assert torch.equal(outcome.weights[name], weight), name
    assert sum(sums for _, sums, _ in with_overlap) > 0
