"""Decoders of transformers as pipeline layers, made of transformers' own modules (the extra `models`).

    layer_list.py        the model as a list of layers
    layers.py            the classes of these layers
    shared.py            what they share on a rank
    plan.py              which modules make which layer
    forward.py           what a model does around its layers, by its own forwards
    packed.py            how the samples of packed rows are kept apart, by masks or cu_seqlens
    tensor_parallel.py   which ranks hold what of a layer, by transformers' plan; the loss over them
    folder.py            the config of a model's folder
    weights.py           their weights, from and to safetensors
    layer_costs.py       what each layer costs, found on the meta device
    quantization.py      whether weights have 4 bits, by config.json or an argument
    four_bit.py          layers of 4 bits by bitsandbytes, under adapters (the extra `lora4bit`)
    lora.py              LoRA adapters by peft in these layers (the extra `lora`)
    lora_files.py        adapters from and to peft's files
"""

from ds_vshape.models.hugging_face.layer_list import (CHECKPOINTABLE_LAYERS, PARTITION_METHOD, next_token_loss,
                                                      pipeline_layers)
from ds_vshape.models.hugging_face.tensor_parallel import TensorParallelLoss
from ds_vshape.models.hugging_face.weights import check_output, load_weights, save_model

__all__ = ["CHECKPOINTABLE_LAYERS", "PARTITION_METHOD", "TensorParallelLoss", "check_output", "load_weights",
           "next_token_loss", "pipeline_layers", "save_model"]
