"""Fine-tuning of Hugging Face models on text and conversations (the extra `finetuning`).

    data.py       rows of a file, on every rank
    samples.py    files to token ids, and which of them are learned
    packing.py    which samples share a row
    training.py   evaluations and checkpoints at intervals, and going on from the last one
    batches.py    micro-batches of rows, in an order that goes on where a training stopped
"""
