"""Everything that one step of one parameter reads and writes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_merge.eager.merging_adamw import Anchor
from fused_merge.sharding import ShardIndex
from fused_merge.sparse import SparseTensor


class Operands(NamedTuple):
    """The tensors of one parameter's step, all of one shape, and what keys its random numbers."""

    param: Tensor  # mutated
    grad: Tensor
    exp_avg: Tensor  # mutated
    exp_avg_sq: Tensor  # mutated
    step: Tensor  # 0-d fp32, the count after its increment
    tau: Tensor | SparseTensor | None  # F(tau); None for a plain AdamW step
    full: Tensor | None  # tau before F, where something is projected onto it and F(tau) is another
    anchor: Anchor | None  # of step-K; mutated
    master: Tensor | None  # mutated
    tensor_id: int
    shard: ShardIndex
