"""Fine-tuning of Hugging Face models on text and conversations (the extra `finetuning`).

    settings.py   what a fine-tuning is told: one table
    composition.py    settings from overrides and configs, by hydra
    data.py       rows to train and to evaluate on, on every rank
    samples.py    files to token ids, and which of them are learned
    packing.py    which samples share a row
    pairs.py      preference pairs: files to rows
    dpo.py        direct preference optimization: the loss of pairs, and their reference
    batches.py    rows to micro-batches, in an order that continues where a training stopped
    training.py   batches, with evaluations and checkpoints at intervals, from the last checkpoint on
"""
