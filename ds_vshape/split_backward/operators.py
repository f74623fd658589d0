"""Which torch functions are split: tables from the function to its split counterpart.

MATRIX_OPERATORS is the default. Norms aren't in it, because deferring them costs more than it gains. In units of
(batch x sequence x hidden) a GPT block whose attention is of the flash type keeps between F and B

    norm input 1, qkv input 1, q k v 3, attention output 1, norm input 1, fc1 input 1, gelu input 4, fc2 input 4 = 16

and between B and W, with its four linears split, their inputs and output gradients

    qkv 1 + 3, projection 1 + 1, fc1 1 + 4, fc2 4 + 1 = 16

Two norms deferred would add their inputs and output gradients, 4 more, for two sums that take no time. The bias of a
linear layer goes with its weight: the output gradient is kept anyway.
"""

from __future__ import annotations

from ds_vshape.split_backward.batched import BATCHED_PRODUCTS
from ds_vshape.split_backward.convolution import CONVOLUTIONS
from ds_vshape.split_backward.function import Operators, apply_split_function, split_function
from ds_vshape.split_backward.matrix import MATRIX_PRODUCTS
from ds_vshape.split_backward.norms import NORM_OPERATORS

MATRIX_OPERATORS: Operators = {**MATRIX_PRODUCTS, **BATCHED_PRODUCTS, **CONVOLUTIONS,
                               apply_split_function: split_function}
ALL_OPERATORS: Operators = {**MATRIX_OPERATORS, **NORM_OPERATORS}
