"""The one way in which this library adds up many numbers: a binary tree over neighbors.

The row-major elements, padded with zeros to a power of two, are added in adjacent pairs, the sums in adjacent pairs
again, until one is left: the sum of an aligned block of 2^k elements is a node of the same tree.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def tree_sum(x: Tensor) -> Tensor:
    """Return the sum over the last dimension `[..., n]` as `[...]`, in the dtype of `x`; 0 for no elements."""
    if x.shape[-1] == 0:
        return x.sum(-1)
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            # A zero at the end of an odd level stands for all the padding above it.
            x = pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    # A sum of nothing but -0 is 0, as with any padding.
    return x[..., 0] + 0.0


def inner_product(x: Tensor, y: Tensor, *, rows: bool = False) -> Tensor:
    """Return <x, y> of two tensors of one shape and dtype, fp32 or fp64, as a 0-d tensor.

    With `rows` it is one for each index along dim 0, `[rows, 1, ...]` with as many dimensions as `x`; tensors of fewer
    than two dimensions are one row.
    """
    product = x * y
    if not rows or x.ndim < 2:
        return tree_sum(product.reshape(-1))
    return tree_sum(product.flatten(1)).view(-1, *[1] * (x.ndim - 1))
