"""Where to cut the layers of a model into stages.

    layers.py                what layers cost, and stages of them
    balance.py               stages that make all ranks work about as long
    balance_many.py          the same for more than two stages on a rank
    partition_and_order.py   stages planned together with the order of passes
"""
