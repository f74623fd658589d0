"""The B/W split: a backward that gives input gradients at once and leaves weight gradients for later.

    store.py        what waits between B and W
    function.py     SplitFunction, an autograd Function in two halves; the base of user kernels and of the built-in ones
    matrix.py       linear, matmul, addmm, embedding
    operators.py    the tables of operators
    mode.py         SplitBackward, the mode that reroutes the operators of a table
"""

from ds_vshape.split_backward.function import SplitFunction, is_deferrable
from ds_vshape.split_backward.mode import SplitBackward
from ds_vshape.split_backward.operators import MATRIX_OPERATORS, Operators
from ds_vshape.split_backward.store import WeightGradientStore

__all__ = ["MATRIX_OPERATORS", "Operators", "SplitBackward", "SplitFunction", "WeightGradientStore", "is_deferrable"]
