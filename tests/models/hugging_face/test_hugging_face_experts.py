"""Mixtures of experts of transformers: nearly all of their parameters get their gradients in W, bit for bit those of
transformers' own models, however transformers computes the experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hugging_face_models import Case, is_of_norm, model_config, pipelines_of, train_plainly
from tiny_model import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from ds_vshape.models.hugging_face import pipeline_layers

FUSED = {"name": "v-zb", "gradient_accumulation_fusion": True}
# Which share of the parameters' elements must be deferred.
LEAST = 0.98


@pytest.mark.quick_cases("grouped_mm-qwen3_moe")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_experts_are_deferred_and_train_what_transformers_trains(experts: str, name: str, tmp_path: Path) -> None:
    """With fusion, a product is added to its sum in one rounding."""
    folder = tmp_path / name
    save_tiny_model(model_config(name), folder)
    exact, fused = Case(folder, "v-half", experts=experts), Case(folder, FUSED, experts=experts)
    outcome, of_fused = pipelines_of([(exact, None), (fused, None)])
    oracle = train_plainly(exact)
    assert oracle.losses[0] > oracle.losses[-1]
    assert outcome.in_b == of_fused.in_b == {parameter for parameter in oracle.weights if is_of_norm(parameter)}
    assert outcome.losses == oracle.losses
    assert of_fused.losses == pytest.approx(oracle.losses, rel=1e-5)
    for parameter, value in oracle.weights.items():
        assert torch.equal(outcome.weights[parameter], value), parameter
        torch.testing.assert_close(of_fused.weights[parameter], value, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_share_of_a_model_of_the_real_size(family: str) -> None:
    """Of the sizes that transformers gives a model by default, 47 and 15 billion parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    in_w = sum(size for name, size in sizes.items() if not is_of_norm(name))
    assert in_w / sum(sizes.values()) > LEAST
    # Without the experts it would be far less.
    others = sum(size for name, size in sizes.items() if not is_of_norm(name) and ".experts." not in name)
    assert others / sum(sizes.values()) < 0.1


def test_an_unknown_implementation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experts_implementation=\"dense\".*eager"):
        pipeline_layers(model_config("mixtral"), experts="dense")
