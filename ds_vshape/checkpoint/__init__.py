"""Checkpoints: whole or not at all, the same on all ranks, and nothing in them is executed.

    checkpointing.py    saves and loads, as a base of the engine
    layout.py           the placement that saved a checkpoint
    replicas.py         optimizer states of another number of replicas
    client_state.py     what the script keeps in a checkpoint
    commit.py           a checkpoint is there whole or not at all
    tags.py             which tags a checkpoint can have
    files.py            DeepSpeed's checkpoint engines, with errors that name the file
    errors.py           what is wrong with a checkpoint, in words
    training_state.py   what a load changes, kept until it has succeeded
    universal.py        universal checkpoints
    weights_only.py     torch.load takes tensors and plain data alone
"""

from ds_vshape.checkpoint.checkpointing import SavingEngine

__all__ = ["SavingEngine"]
