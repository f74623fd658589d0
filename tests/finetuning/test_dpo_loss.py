"""Losses of preference pairs on the logits of one model, as TRL computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_model import chat_tokenizer, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from ds_vshape.finetuning.dpo import LOSS_TYPES, DPOLoss
from ds_vshape.finetuning.pairs import PairRows, pairs_of
from ds_vshape.split_backward.head import HeadOutput, Projection

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses names that transformers has deprecated

ROWS = [{"prompt": "What?", "chosen": " A cat, as you know.", "rejected": " No."},
        {"prompt": "Who", "chosen": " cares?", "rejected": "m do you mean? Tell me more."},
        {"prompt": "Where", "chosen": " here", "rejected": " there"}]
BETA = 0.7


class Trained:
    """A model, its reference, and TRL's trainer of both."""

    def __init__(self, folder: Path) -> None:
        tokenizer = chat_tokenizer()
        config = tiny_config("llama", layers=2, vocab_size=len(tokenizer))
        torch.manual_seed(0)
        self.model, self.reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
        rows, others = Dataset.from_list(ROWS), Dataset.from_list(
            [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS])
        self._trainers = [DPOTrainer(
            self.model, self.reference, processing_class=tokenizer, train_dataset=each, args=DPOConfig(
                output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=BETA,
                per_device_train_batch_size=len(ROWS), train_sampling_strategy="sequential", report_to="none"))
            for each in (rows, others)]
        self.batch = PairRows(pairs_of(rows, tokenizer, 1000)).micro_batch(range(len(ROWS)))

    def trl_loss(self, loss_type: str, smoothing: float, swapped: bool = False) -> Tensor:
        """TRL's loss; `swapped` takes the chosen answers for the rejected ones."""
        trainer: Any = self._trainers[swapped]
        trainer.loss_types, trainer.label_smoothing = [loss_type], smoothing
        loss: Tensor = trainer.compute_loss(self.model, next(iter(trainer.get_train_dataloader())))
        return loss

    def loss(self, loss_fn: DPOLoss) -> Tensor:
        ids, labels = self.batch
        with torch.no_grad():
            reference = loss_fn(self.reference(ids).logits, labels)
        return loss_fn(self.model(ids).logits, (labels, reference))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.model.parameters())))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("loss_type, smoothing", [*((name, 0.0) for name in LOSS_TYPES), ("robust", 0.2),
                                                  ("sigmoid", 0.2)])
def test_losses_are_those_of_trl(loss_type: str, smoothing: float, trained: Trained) -> None:
    oracle = trained.trl_loss(loss_type, smoothing)
    if loss_type == "sigmoid":  # TRL has no conservative DPO: the mean over labels of both kinds
        oracle = (1 - smoothing) * oracle + smoothing * trained.trl_loss(loss_type, 0.0, swapped=True)
    ours = trained.loss(DPOLoss(beta=BETA, loss_type=loss_type, label_smoothing=smoothing))
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=0.0)
    for gradient, expected in zip(trained.gradients(ours), trained.gradients(oracle)):
        assert 0 < expected.norm() and (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("arguments, told", [
    ({"beta": 0.0}, "beta = 0.0: must be greater than 0"),
    ({"beta": float("inf")}, "beta = inf: must be greater than 0, and finite"),
    ({"loss_type": "dpo"}, "loss_type = 'dpo': must be one of sigmoid, robust, hinge"),
    ({"label_smoothing": 0.5}, "label_smoothing = 0.5: must be from 0 to less than 0.5"),
    ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing = 0.1: must be 0 with loss_type = 'ipo'"),
])
def test_what_is_not_legal_is_told(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DPOLoss(**arguments)


def test_logits_in_chunks_and_in_parts_are_refused() -> None:
    labels = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)
    output = HeadOutput(torch.zeros(2, 3, 4), Projection(torch.zeros(5, 4)))
    with pytest.raises(ValueError, match="chunked_head = True: must be False with DPOLoss"):
        DPOLoss()(output, labels)
    part: Any = torch.zeros(2, 3, 5)
    part.tensor_model_parallel = True
    with pytest.raises(ValueError, match="part of the vocabulary: must be DPOLoss"):
        DPOLoss()(part, labels)
