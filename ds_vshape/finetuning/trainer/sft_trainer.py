"""TRL's SFTTrainer with a pipeline engine in the place of its training step (the extra `sft`)."""

from __future__ import annotations

from ds_vshape.finetuning.trainer.pipeline_trainer import PipelineTrainer

try:
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise ImportError("PipelineSFTTrainer needs trl: pip install 'ds-vshape[sft]'") from error


class PipelineSFTTrainer(PipelineTrainer, SFTTrainer):
    """As PipelineTrainer, with the data sets, chat templates, packing and SFTConfig of TRL's SFTTrainer.

    Entropy and token accuracy aren't logged, since they need logits. Adapters are left to launch/finetune.py.
    """
