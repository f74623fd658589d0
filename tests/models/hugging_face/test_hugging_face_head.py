"""Hugging Face models with a head in chunks of tokens, against transformers' own models in one process.

Sums are taken in another order, so losses and weights are equal up to rounding.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from finetune_runs import run_finetune
from hugging_face_models import CONFIGS, Case, evaluate, model_config, pipelines_of, train_plainly
from pipelines import FP32_ZERO1, Job
from ranks import run_ranks
from tiny_model import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import ds_vshape
from ds_vshape.models.hugging_face import (PARTITION_METHOD, TensorParallelLoss, load_weights, next_token_loss,
                                           pipeline_layers)
from ds_vshape.models.parallel_layers import tensor_group
from ds_vshape.split_backward.head import HeadOutput

FUSED = {"name": "v-half", "gradient_accumulation_fusion": True}


@dataclass(frozen=True)
class Chunked(Case):
    """A training run whose logits are left to the loss."""

    tensor: int = 1

    def module(self) -> Any:
        config = AutoConfig.from_pretrained(self.folder)
        topology = PipeModelDataParallelTopology(num_pp=self.stages, num_mp=self.tensor, num_dp=1)
        group = tensor_group(topology)
        module = ds_vshape.PipelineModule(
            pipeline_layers(config, self.attention, tensor_group=group, chunked_head=True), topology=topology,
            loss_fn=next_token_loss if self.tensor == 1 else TensorParallelLoss(group),
            partition_method=PARTITION_METHOD, config=self.job.ds_config())
        assert load_weights(module, self.folder) == []
        return module


def saved(name: str, folder: Path) -> Path:
    save_tiny_model(model_config(name), folder)
    return folder


# Tied, scaled and capped logits, a router loss; the others in the slow suite.
@pytest.mark.quick_cases("gemma2-tied")
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_what_transformers_trains(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "source")
    cases = [Chunked(folder, FUSED, config=FP32_ZERO1), Chunked(folder, "zb-h1")]
    output = tmp_path / "output"
    for case, outcome in zip(cases, pipelines_of([(cases[0], output), (cases[1], None)]), strict=True):
        oracle = train_plainly(case)
        assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5)
        assert outcome.weights.keys() == oracle.weights.keys()
        for parameter, value in oracle.weights.items():
            # Adam makes a twentieth of a step, at most, of a gradient that is nearly nothing but rounding.
            torch.testing.assert_close(outcome.weights[parameter], value, rtol=1e-3, atol=5e-4)
        if case is cases[0]:
            loss, logits = evaluate(AutoModelForCausalLM.from_pretrained(output), case)
            assert outcome.evaluated == pytest.approx(loss, rel=1e-6)
            torch.testing.assert_close(outcome.logits, logits, rtol=1e-5, atol=1e-6)


def losses_of(rank: int, case: Chunked) -> list[float]:
    engine = case.engine()
    return [float(engine.train_batch(case.batch(batch))) for batch in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2-tied", "mixtral"])
def test_on_tensor_parallel_ranks(name: str, tmp_path: Path) -> None:
    """Each chunk of logits is cut by the vocabulary."""
    folder = saved(name, tmp_path / "source")
    case = Chunked(folder, FUSED, config=FP32_ZERO1, tensor=2)
    oracle = train_plainly(case)
    for losses in run_ranks(4, losses_of, case, timeout=300):
        assert losses == pytest.approx(oracle.losses, rel=1e-5)


def run_and_count(rank: int, words: list[str]) -> tuple[list[float], int]:
    """What the program finds, and how many losses a head in chunks has computed."""
    counted, loss = [], HeadOutput.loss
    HeadOutput.loss = lambda *args: (counted.append(1), loss(*args))[1]  # type: ignore[method-assign]
    return run_finetune(rank, words), len(counted)


@pytest.mark.slow
def test_the_program_has_an_option_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = saved("llama", tmp_path / "source"), tmp_path / "ds_config.json"
    config.write_text(json.dumps(Job("v-half", 2, 4).ds_config()))
    words = ["--model", str(source), "--text", str(Path(__file__).parents[1]), "--batches", "2", "--length", "16",
             "--deepspeed_config", str(config)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    chunked, whole = (run_ranks(2, run_and_count, [*words, "--output", str(tmp_path / f"{len(option)}"), *option],
                                timeout=200) for option in (["--chunked_head"], []))
    for (losses, _), (oracle, none) in zip(chunked, whole, strict=True):
        assert losses == pytest.approx(oracle, rel=1e-5) and none == 0
    assert sum(count for _, count in chunked) >= 2 * 4
