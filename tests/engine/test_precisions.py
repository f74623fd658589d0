"""Every precision with every place for the gradients: equal to DeepSpeed's engine on one stage, or refused.

These are all combinations, where test_feature_matrix.py tries pairs: what accumulates where, and what clipping,
tied weights and ranks with nothing to train make of it, depends on three and four keys at once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from pipelines import (VOCABULARY, WIDTH, Block, FrozenBlock, FrozenEmbedding, Job, Outcome, merged, specs, tied_specs,
                       train)
from ranks import run_ranks
from torch import nn

from ds_vshape.config.compatibility import check_accepted
from ds_vshape.config.section import ConfigError
from ds_vshape.module.dummy_parameter import NAME

# Of each precision: ZeRO, the accumulation dtype, immediate updates (a key of bf16's). Each has an optimizer or a place
# for its gradients that the others haven't.
PLACES = {"fp32": [(0, None, False), (1, None, False), (1, "bf16", False)],
          "bf16": [(0, None, False), (0, None, True), (1, None, False), (1, "fp16", False), (1, "fp32", False),
                   (1, "fp32", True)],
          "fp16": [(1, None, False), (1, "fp32", False)]}
# What else is legal: the same as one of those in other words, or with a key that has no effect there.
SYNONYMS = {"fp32": [(0, "fp32", False), (1, "fp32", False)],
            "bf16": [(0, "bf16", False), (1, "bf16", False), (1, None, True)],
            "fp16": [(1, "fp16", False)]}
STAGES, MICRO_BATCHES, BATCHES = 2, 3, range(3)
CLIP = 0.3
ROUNDING = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


def ds_config(precision: str, zero: int, accumulation: str | None, immediate: bool, clip: float) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": zero}, "gradient_clipping": clip}
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    if immediate:
        config[precision]["immediate_grad_update"] = True
    if accumulation:
        config["data_types"] = {"grad_accum_dtype": accumulation}
    return config


# The first rank of a linear placement has nothing to train, the second one of a V neither.
HALF_FROZEN = [LayerSpec(FrozenEmbedding), *[LayerSpec(FrozenBlock)] * 2, *[LayerSpec(Block)] * 2,
               LayerSpec(nn.Linear, WIDTH, VOCABULARY)]
MIDDLE_FROZEN = [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *[LayerSpec(FrozenBlock)] * 2,
                 LayerSpec(nn.Linear, WIDTH, VOCABULARY)]
# Each with a schedule on whose placement it is hard.
FUSED = {"gradient_accumulation_fusion": True}
MODELS: dict[str, tuple[Any, list[Any]]] = {
    "own head": ("v-half", specs(4)), "tied head": ("zb-h1", tied_specs(4)),
    "half frozen": ({"name": "zb-h1", **FUSED}, HALF_FROZEN),
    "middle frozen": ({"name": "v-half", **FUSED}, MIDDLE_FROZEN)}


def configs(precision: str, model: str) -> list[dict[str, Any]]:
    """All that is legal, with and without clipping; models with something special with all that differs, clipped."""
    if model == "own head":
        return [ds_config(precision, *others, clip)
                for others in PLACES[precision] + SYNONYMS[precision] for clip in (0.0, CLIP)]
    return [ds_config(precision, *others, CLIP) for others in PLACES[precision]]


def train_jobs(rank: int, jobs: list[Job]) -> list[tuple[Outcome, float | None]]:
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    results = []
    for job in jobs:
        print(job)
        engine = job.engine()
        outcome, norm = train(engine, BATCHES), engine.get_global_grad_norm()
        results.append((outcome, None if norm is None else float(norm)))
    return results


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", PLACES)
@pytest.mark.quick_cases("fp32-tied head", "bf16-middle frozen")
def test_all_that_is_legal_is_equal(precision: str, model: str) -> None:
    """Bit for bit, but for the order in which norms are added up over ranks, the two gradients of a tied weight, and
    products with what they are added to."""
    schedule, layers = MODELS[model]
    of_one, ours = ([Job(name, stages, MICRO_BATCHES, config, tuple(layers)) for config in configs(precision, model)]
                    for name, stages in ((None, 1), (schedule, STAGES)))
    oracles, = run_ranks(1, train_jobs, of_one)
    results = run_ranks(STAGES, train_jobs, ours, timeout=240)
    for job, (oracle, norm), *of_ranks in zip(ours, oracles, *results, strict=True):
        outcome = merged([outcome for outcome, _ in of_ranks])
        assert (outcome.weights.pop(NAME, None) is not None) == model.endswith("frozen")
        assert outcome.weights.keys() == oracle.weights.keys(), job
        if not job.config["gradient_clipping"]:
            assert outcome.losses == oracle.losses, job
            assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), job
        else:
            assert norm is None or norm > CLIP, "a clip that never acts proves nothing"
            assert outcome.losses == pytest.approx(oracle.losses, rel=ROUNDING[precision]), job
            rounding = 1e-5 if model == "own head" else 1e-3
            assert norm is None or [norm for _, norm in of_ranks] == pytest.approx([norm] * STAGES, rel=rounding), job


REFUSED = {
    "fp32 sums of bf16 without ZeRO": (ds_config("bf16", 0, "float32", False, 0.0),
                                       "data_types.grad_accum_dtype = 'fp32' with bf16 and zero_optimization.stage = "
                                       "0: must be 'bf16', or zero_optimization.stage 1"),
    "bf16 sums of fp32 without ZeRO": (ds_config("fp32", 0, "bf16", False, 0.0),
                                       "data_types.grad_accum_dtype = 'bf16' with fp32 and zero_optimization.stage = "
                                       "0: must be 'fp32', or zero_optimization.stage 1"),
    "fp16 without ZeRO": (ds_config("fp16", 0, "fp32", False, 0.0),
                          "zero_optimization.stage = 0 with fp16: must be 1, because DeepSpeed's optimizer"),
    "no dtype": (ds_config("bf16", 1, "fp8", False, 0.0),
                 "data_types.grad_accum_dtype = 'fp8': must be 'fp32', 'bf16', 'fp16'"),
    "integers": (ds_config("bf16", 1, "int8", False, 0.0),
                 "data_types.grad_accum_dtype = 'int8': must be 'fp32', 'bf16', 'fp16'"),
    "two precisions": ({"bf16": {"enabled": True}, "fp16": {"enabled": True}},
                       "bf16.enabled and fp16.enabled = true: must be one of them"),
    "ZeRO-2": ({"zero_optimization": {"stage": 2}},
               "zero_optimization.stage = 2: must be 0 or 1 with pipeline parallelism"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_deepspeed_gets_wrong_or_cannot_do_is_refused(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check_accepted(config)
