"""All that the package knows of DeepSpeed's private parts: a new version of DeepSpeed changes these files alone.

    versions.py      the tested versions of DeepSpeed and torch
    parts.py         the private parts by name, which are checked before training starts
    engine.py        PipelineEngine and DeepSpeedEngine
    timers.py        the names of DeepSpeed's timers
    optimizers.py    what its optimizers keep: gradients, master weights, states; their steps and reductions
    module.py        PipelineModule
    experts.py       its MoE layers: their groups
    checkpoints.py   what is saved, and the functions around it
    checkpointing.py activation checkpoints and their random states
    silent_group.py  process groups of ranks that aren't there
    utils.py         which parameters tensor parallel ranks share, seeds, names of dtypes

Methods of DeepSpeed's that must be overridden are overridden in our subclasses; parts.py lists them.
"""
