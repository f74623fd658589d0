"""Models as lists of pipeline layers.

    gpt.py               a byte-level GPT
    gpt_parallel.py      the same with each block on several tensor parallel ranks
    parallel_layers.py   DeepSpeed's tensor parallel layers, with sums that run concurrently with W
    hugging_face/        decoders of transformers (the extra `models`)
"""
