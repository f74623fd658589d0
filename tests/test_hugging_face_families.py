"""Families of transformers, cut by their plans: trained beside transformers' own models in one process.

Losses and weights are equal bit for bit under V. Not so where embedding and head are one weight, whose two gradients
are added in another order than autograd's, and where router losses cross DeepSpeed's own 1F1B.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hugging_face_models import (CONFIGS, Case, Outcome, evaluate, model_config, pipelines_of, tensors_in,
                                 train_plainly)
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

FAMILIES = list(CONFIGS)


def saved_model(name: str, folder: Path) -> Path:
    """A random model as transformers saves it; some in one file, some in many."""
    save_tiny_model(model_config(name), folder, **({"max_shard_size": "40KB"} if name.startswith("qwen") else {}))
    return folder


def is_exact(case: Case) -> bool:
    config = model_config(case.folder.parent.name)
    return not config.tie_word_embeddings and (
        case.schedule is not None or not getattr(config, "output_router_logits", False))


def assert_trained_alike(outcome: Outcome, oracle: Outcome, exact: bool) -> None:
    assert oracle.losses[0] > oracle.losses[-1]
    assert outcome.weights.keys() == oracle.weights.keys()
    if exact:
        assert outcome.losses == oracle.losses
        for parameter, value in oracle.weights.items():
            assert torch.equal(outcome.weights[parameter], value), parameter
    else:
        assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5)
        for parameter, value in oracle.weights.items():
            torch.testing.assert_close(outcome.weights[parameter], value, rtol=1e-3, atol=1e-4)


@pytest.mark.quick_cases("gemma3_text", "mixtral")
@pytest.mark.parametrize("name", FAMILIES)
def test_trains_what_transformers_trains(name: str, tmp_path: Path) -> None:
    folder = saved_model(name, tmp_path / name / "source")
    cases = [Case(folder, None), Case(folder, "v-half"), Case(folder, "v-zb", attention="eager", with_positions=True)]
    saved = [tmp_path / str(place) for place in range(len(cases))]
    for case, outcome, output in zip(cases, pipelines_of(list(zip(cases, saved))), saved, strict=True):
        oracle = train_plainly(case)
        assert_trained_alike(outcome, oracle, is_exact(case))
        if case.schedule is not None:
            # The scales and shifts of norms stay in B, and experts, whose tokens aren't all; all else is split: GPT-2's
            # Conv1D and both embeddings too.
            in_b = {parameter for parameter in oracle.weights
                    if any(part in parameter for part in ("norm", ".ln_", ".experts."))}
            assert outcome.in_b == in_b

        loaded = AutoModelForCausalLM.from_pretrained(output, attn_implementation=case.attention)
        loss, logits = evaluate(loaded, case)
        assert loss == outcome.evaluated
        assert torch.equal(logits, outcome.logits)
        before, after = tensors_in(folder), tensors_in(output)
        assert after.keys() == before.keys(), "named as transformers names them in files, a tied weight once"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_four_ranks(name: str, tmp_path: Path) -> None:
    """With V, the eight stages have a decoder layer each; a micro-batch crosses six boundaries between ranks."""
    folder = saved_model(name, tmp_path / name / "source")
    cases = [Case(folder, schedule, stages=4) for schedule in (None, "v-half", "v-zb")]
    for case, outcome in zip(cases, pipelines_of([(case, None) for case in cases], world=4), strict=True):
        assert_trained_alike(outcome, train_plainly(case), is_exact(case))
