"""The Trainer of transformers with a pipeline engine in the place of its training step.

    pipeline_trainer.py   PipelineTrainer: the loop, callbacks, logs and checkpoints are the Trainer's
    sft_trainer.py        the same on top of TRL's SFTTrainer (the extra `sft`)
    arguments.py          which arguments of a Trainer a pipeline can't follow
    ds_config.py          the config of the engine, completed by TrainingArguments
    model.py              a folder, a config or a model as the layers of a pipeline
    micro_batches.py      a collator's batches as the engine's inputs and labels
    loss.py               the losses that a Trainer computes
"""
