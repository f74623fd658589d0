"""Models as lists of pipeline layers.

    gpt.py                     a byte-level GPT
    gpt_parallel.py            the same with each block on several tensor parallel ranks
    parallel_layers.py         DeepSpeed's tensor parallel layers, with sums that run concurrently with W
    hugging_face.py            decoders of transformers, made of their own modules (the extra `models`)
    hugging_face_layers.py     the classes of these layers
    hugging_face_shared.py     what they share on a rank
    hugging_face_plan.py       which modules make which layer
    hugging_face_quantization.py   whether weights have 4 bits, by config.json or an argument
    hugging_face_forward.py    what a model does around its layers, by its own forwards
    hugging_face_tensor_parallel.py   which ranks hold what of a layer, by transformers' plan; the loss over them
    hugging_face_weights.py    their weights, from and to safetensors
    layer_costs.py             what each of their layers costs, found on the meta device
    lora.py                    LoRA adapters by peft in these layers (the extra `lora`)
    lora_files.py              adapters from and to peft's files
    four_bit.py                layers of 4 bits by bitsandbytes, under such adapters (the extra `lora4bit`)
"""
