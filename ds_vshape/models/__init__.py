"""Models as lists of pipeline layers.

    gpt.py                     a byte-level GPT
    gpt_parallel.py            the same with each block on several tensor parallel ranks
    hugging_face.py            decoders of transformers, made of their own modules (the extra `models`)
    hugging_face_plan.py       which modules make which layer
    hugging_face_forward.py    what a model does around its layers, by its own forwards
    hugging_face_weights.py    their weights, from and to safetensors
"""
