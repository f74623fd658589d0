"""The model as a pipeline module: its layers, cut into stages, several of them on a rank.

    pipeline_module.py   PipelineModule, which builds as many chunks on a rank as the schedule's placement puts there
    segment.py           layers that run together between two activation checkpoints
    tied.py              layers that share weights, wherever they stand
    shared_weights.py    weights that several layers hold without a TiedLayerSpec
    loss_fn.py           the weights of a loss function that is a module
    layer_times.py       how long each layer takes, measured before the model is cut
    partition_planning.py   where it is cut, planned together with the order of passes
    dummy_parameter.py   a parameter for ranks that have nothing to train
    fast_setattr.py      attributes that change with each pass
"""

from ds_vshape.module.pipeline_module import PipelineModule

__all__ = ["PipelineModule"]
