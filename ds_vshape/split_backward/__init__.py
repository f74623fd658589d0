"""The B/W split: a backward that gives input gradients at once and leaves weight gradients for later.

    store.py        what waits between B and W
    targets.py      what a gradient is the gradient of: a parameter, an element of one, a cast
    weights.py      which tensors take part
    ownership.py    which tensors others may write to before W, and which of them nothing but autograd holds
    function.py     SplitFunction, an autograd Function in two halves; the base of user kernels and of the built-in ones
    accumulate.py   gradients added to a sum in place
    matrix.py       linear, matmul, mm, addmm, embedding
    batched.py      bmm, grouped products, indexing: the experts of a mixture in one tensor
    head.py         a head and its loss in chunks of tokens, whose weight gradient F makes
    convolution.py  conv1d, conv2d, conv3d
    norms.py        layer_norm, rms_norm
    casts.py        autocast's casts of the operands, made ahead of the operator
    autocast.py     W under the autocast that B found
    operators.py    the tables of operators, and why norms aren't in the default one
    mode.py         SplitForward and SplitBackward, the modes that reroute the operators of a table
    tensor_parallel.py   the sum of an input gradient over tensor parallel ranks, concurrently with W
    kernels/        Triton kernels
"""

from ds_vshape.split_backward.function import Operator, Operators, SplitFunction
from ds_vshape.split_backward.mode import SplitBackward, SplitForward, active_store
from ds_vshape.split_backward.norms import NORM_OPERATORS
from ds_vshape.split_backward.operators import ALL_OPERATORS, MATRIX_OPERATORS
from ds_vshape.split_backward.store import Entry, GradientAccumulator, WeightGradientStore, WholeGradients
from ds_vshape.split_backward.weights import any_of_script, is_deferrable, may_defer, never_defer

__all__ = [
    "ALL_OPERATORS",
    "MATRIX_OPERATORS",
    "NORM_OPERATORS",
    "GradientAccumulator",
    "Entry",
    "Operator",
    "Operators",
    "SplitBackward",
    "SplitForward",
    "SplitFunction",
    "WeightGradientStore",
    "WholeGradients",
    "active_store",
    "any_of_script",
    "is_deferrable",
    "may_defer",
    "never_defer",
]
