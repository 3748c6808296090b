"""Everything that one step of one parameter reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from fused_merge.eager.merging_adamw import Anchor
from fused_merge.eager.shard import Shard
from fused_merge.eager.sparse import SparseTensor

Tau: TypeAlias = "Tensor | SparseTensor | None"


class Operands(NamedTuple):
    """The tensors of one parameter's step, all of one shape, and what keys its random numbers."""

    name: str  # used in error messages
    param: Tensor  # mutated
    grad: Tensor | None  # None where another optimizer has taken the step: u is then what came since the anchor
    exp_avg: Tensor | None  # mutated; None without a gradient
    exp_avg_sq: Tensor | None  # mutated; None without a gradient
    step: Tensor  # 0-d fp32, the step count; incremented
    tau: Tau  # F(tau); None for a plain AdamW step
    tau_dense: Tensor | None  # tau before F, where something is projected onto it and F(tau) is another
    anchor: Anchor | None  # of step-K, and of another optimizer's steps; mutated
    master: Tensor | None  # fp32, or the int16 low halves of a bf16 parameter; mutated
    tensor_id: int
    shard: Shard

    def split(self, shape: Sequence[int]) -> tuple[Operands, Operands]:
        """Return the first rows, which a tau of this shape in whole has, and the rest, a plain AdamW step: views."""
        assert self.tau is not None
        rows = self.tau.shape[0]
        parts = []
        for side in (slice(None, rows), slice(rows, None)):
            tensors = {name: getattr(self, name) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "master")}
            cut: dict[str, Any] = {name: x if x is None else x[side] for name, x in tensors.items()}
            parts.append(self._replace(**cut))
        first, rest = parts
        anchor = self.anchor and self.anchor._replace(weights=self.anchor.weights[:rows])
        first = first._replace(anchor=anchor, shard=self.shard._replace(shape=shape))
        # Both count the same step.
        rest = rest._replace(tau=None, tau_dense=None, anchor=None, step=self.step.clone())
        return first, rest._replace(shard=self.shard._replace(elements=self.shard.elements.after(first.param.numel())))
