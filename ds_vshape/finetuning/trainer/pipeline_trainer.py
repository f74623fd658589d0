"""The Trainer of transformers whose training step is a pipeline engine's `train_batch`.

    Trainer.train
      _prepare_for_training     the engine, its optimizer and scheduler; or all that a checkpoint says of them
      for each batch:
        get_batch_samples       gradient_accumulation_steps micro-batches
        training_step           after the last of them: train_batch, with the optimizer's step
        log, evaluate, save     evaluation_loop by eval_batch, save_model and save_checkpoint by all ranks

The rest is the Trainer's: its loop, data order, callbacks, learning rate, log history and checkpoint folders. It runs
in its DeepSpeed mode, where the engine steps the optimizer. `self.model` is a model without data, for all that asks
what the model is; accelerate never sees the engine.

All that isn't public in transformers and accelerate is touched in this file. Versions: transformers 5.24 to 5.x,
accelerate 1.10 to 1.x; tests/finetuning/test_trainer.py compares with the Trainer itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_vshape.finetuning.trainer.arguments import check_arguments, check_methods, recomputed_layers
from ds_vshape.finetuning.trainer.ds_config import EngineConfig
from ds_vshape.finetuning.trainer.loss import TrainerLoss
from ds_vshape.finetuning.trainer.micro_batches import micro_batch, most_samples
from ds_vshape.finetuning.trainer.model import OwnWeights, Source, check_groups, topology_of
from ds_vshape.models.hugging_face.weights import remove_weights, save_model
from ds_vshape.plugin import initialize

try:
    from accelerate.data_loader import prepare_data_loader
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DeepSpeedSchedulerWrapper
    from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments
    from transformers.trainer import TRAINING_ARGS_NAME
    from transformers.trainer_utils import EvalLoopOutput, has_length
except ImportError as error:
    raise ImportError("PipelineTrainer needs transformers and accelerate: "
                      "pip install 'ds-vshape[finetuning]'") from error

# Micro-batches of an eval_batch, so that long evaluations need no longer plan.
EVALUATED_AT_ONCE = 64


class PipelineTrainer(Trainer):
    """Trains a causal language model in a pipeline of all ranks, or in several pipelines.

    To be made, and its methods to be called, on every rank. Arguments are those of transformers' Trainer, by name, and:

    Args:
        model: a folder with config.json and safetensors, of which each rank reads its own layers; a PreTrainedModel,
            which then every rank holds at the start; or a config, for random weights by `args.seed`.
        args: TrainingArguments with `deepspeed`, a config with the key "pipeline_schedule". Its "auto" values, and
            batch size, clipping and precision where it leaves them out, are those of `args`.
        stages: how many ranks are a pipeline, 0 for all; the other factor of their number are data parallel replicas.
        samples_per_row: where the collator puts several samples into a row and attention takes no masks, as flash
            attention: the most of them. By default as many as there can be by the data sets.

    The losses are the means over tokens that the Trainer computes. A batch is gradient_accumulation_steps micro-batches
    of per_device_train_batch_size rows in each pipeline. All ranks of a pipeline draw them: a collator must give them
    the same tensors.

    Raises:
        ValueError: for arguments that a pipeline can't follow (ds_vshape/finetuning/trainer/arguments.py).
        TypeError: for a subclass with a method that is never called.
        ConfigError: for a DeepSpeed config without a schedule, or that no schedule supports.
    """

    # Without data, on the meta device.
    model: Any

    def __init__(self, model: str | Path | Any, args: TrainingArguments, *, stages: int = 0,
                 samples_per_row: int | None = None, **others: Any) -> None:
        check_methods(type(self), PipelineTrainer)
        check_arguments(args, others)
        topology = topology_of(stages, args.world_size)
        self._replicas: int = topology.get_dim("data")
        self._ds_config = EngineConfig(args, self._replicas)
        source = Source(model)
        self._engine: Any = None
        self._samples: list[Any] = []
        super().__init__(model=source.description, args=args, **others)
        self.deepspeed: Any
        self._packed = (isinstance(self.data_collator, DataCollatorWithFlattening)
                        or bool(getattr(self.data_collator, "padding_free", False)))
        self._loss_fn = TrainerLoss(self.args.label_smoothing_factor)
        if self._packed and samples_per_row is None:
            samples_per_row = self._most_samples()
        self._module = source.module(topology, self._packed, recomputed_layers(self.args), self.args.seed,
                                     samples_per_row, loss_fn=self._loss_fn, config=self._ds_config.of_module)

    def _most_samples(self) -> int:
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        rows = max(self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size)
        return most_samples(self.data_collator, [self.train_dataset, *evaluated], rows)

    # -- data: each replica has rows of its own, and all its ranks the same ones

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Accelerate counts every rank as a replica.
        self.accelerator.prepare = self._prepared

    def _prepared(self, loader: Any) -> Any:
        """In place of Accelerator.prepare, which the Trainer calls for data loaders alone here."""
        settings = self.accelerator
        # Ranks of a pipeline have drawn different random numbers by now.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return prepare_data_loader(loader, settings.device, num_processes=self._replicas,
                                   process_index=self._replica, put_on_device=True, rng_types=None,
                                   dispatch_batches=False, use_seedable_sampler=True, data_seed=seed,
                                   non_blocking=settings.non_blocking)

    @property
    def _replica(self) -> int:
        return int(self._module.mpu().get_data_parallel_rank())

    @property
    def _stages(self) -> int:
        return int(self.args.world_size) // self._replicas

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self._replicas

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The Trainer adds up what all ranks say.
        return super().floating_point_ops(inputs) // self._stages

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._stages

    def _pair(self, batch: Any) -> tuple[Any, Tensor]:
        return micro_batch(batch, self._packed)

    # -- the engine

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any,
                              resume_from_checkpoint: str | None) -> tuple[nn.Module, Any]:
        if self._created_lr_scheduler:  # by an earlier call of train
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self._start_engine(max_steps)
        # Asked whether an overflow has skipped the step; each call of train empties it.
        self.accelerator._optimizers = [self.optimizer]
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            path, _ = self._engine.load_checkpoint(str(resume_from_checkpoint))
            if path is None:
                raise ValueError(f"resume_from_checkpoint = {resume_from_checkpoint!r}: must be a folder that "
                                 "PipelineTrainer has saved without save_only_model")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        # For the Trainer's loop, which clears its gradients and counts its parameters.
        return self.model, train_dataloader

    def _start_engine(self, steps: int) -> None:
        """Make the engine, at its first use (collective); `steps` are those of a scheduler in the DeepSpeed config."""
        if self._engine is not None:
            return
        config = self._ds_config.of_engine(self.model, steps)
        weights: dict[str, Any] = {}
        if "optimizer" in config:
            weights["model_parameters"] = [weight for weight in self._module.parameters() if weight.requires_grad]
        else:
            config["zero_allow_untested_optimizer"] = True
            weights["optimizer"] = self.create_optimizer(OwnWeights(self._module))
            check_groups(weights["optimizer"])
        self._engine, optimizer, _, scheduler = initialize(model=self._module, config=config, **weights)
        self.deepspeed = self.model_wrapped = self._engine
        # The engine steps; what the Trainer steps is told so.
        self.optimizer = DeepSpeedOptimizerWrapper(optimizer)
        if scheduler is not None:
            self.lr_scheduler = DeepSpeedSchedulerWrapper(scheduler, self.optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Layers of a pipeline have other names.
        return super().get_decay_parameter_names(self.model)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int,
                          device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of the next batch. The engine counts their tokens."""
        self._samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._samples, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The batch's loss if `inputs` are the last micro-batch that get_batch_samples gave, after a step by all of
        them; 0 before."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self.model.train()
        pairs = list(map(self._pair, self._samples))
        if len(pairs) != self._engine.micro_batches:  # at the end of an epoch, and after it
            self._engine.set_train_batch_size(len(pairs) * self.args.per_device_train_batch_size * self._replicas)
        loss: Tensor = self._engine.train_batch(iter(pairs))
        return loss.detach().to(self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._engine.get_global_grad_norm()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    # -- evaluation

    def evaluation_loop(self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
                        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> EvalLoopOutput:
        """The mean over rows of the losses of the micro-batches that they are in, as the Trainer computes it."""
        self._start_engine(self._planned_steps())
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        losses: list[float] = []
        batches, rows = iter(dataloader), 0
        while chunk := list(islice(batches, EVALUATED_AT_ONCE)):
            rows += sum(len(batch["input_ids"]) for batch in chunk) * self._replicas
            losses += self._evaluated(list(map(self._pair, chunk)))
            for _ in chunk:
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        dataset = getattr(dataloader, "dataset", None)
        samples = len(dataset) if has_length(dataset) else rows
        # Rows of the last batches that are there twice, so that all replicas have as many, don't count again.
        of_rows = torch.tensor(losses, dtype=torch.float64).repeat_interleave(self.args.eval_batch_size)[:samples]
        metrics = {f"{metric_key_prefix}_loss": of_rows.mean().item()} if len(of_rows) else {}
        return EvalLoopOutput(predictions=None, label_ids=None,  # type: ignore[arg-type]
                              metrics=metrics, num_samples=samples)

    def _evaluated(self, pairs: list[tuple[Any, Tensor]]) -> list[float]:
        """The losses of the micro-batches of all replicas, in the order of the data (collective)."""
        self._engine.eval_batch(iter(pairs), num_micro_batches=len(pairs))
        own = [loss.item() for loss in self._loss_fn.evaluated]
        self._loss_fn.evaluated.clear()
        of_ranks: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(of_ranks, (self._replica, own))
        of_replicas = [losses for _, losses in sorted(of_ranks) if losses]
        return [loss for together in zip(*of_replicas, strict=True) for loss in together]

    def _planned_steps(self) -> int:
        """Of the training that may follow an evaluation."""
        if self._engine is not None or self.train_dataset is None:
            return max(self.args.max_steps, 1)
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def predict(self, *_: Any, **__: Any) -> Any:
        """Refused: predictions need logits, which the pipeline doesn't gather."""
        raise NotImplementedError("predict needs logits, which no rank of a pipeline keeps: evaluate gives the loss, "
                                  "and the folder of save_model loads in AutoModelForCausalLM")

    # -- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a folder that loads in AutoModelForCausalLM, with the processing class (collective). A model that is
        there already is replaced."""
        folder = Path(output_dir or str(self.args.output_dir))
        remove_weights(folder)
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        save_model(self._module, config, None, folder)
        if not self.args.should_save:
            return
        if isinstance(self.model, PreTrainedModel) and self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
