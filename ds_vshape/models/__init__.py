"""Models as lists of pipeline layers.

    gpt.py                     a byte-level GPT
    gpt_parallel.py            the same with each block on several tensor parallel ranks
    hugging_face.py            Llama, Qwen2 and GPT-2, made of the layers of transformers (the extra `models`)
    hugging_face_weights.py    their weights, from and to safetensors
"""
