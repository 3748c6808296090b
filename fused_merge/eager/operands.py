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
    """The tensors of one parameter's step, all of one shape and on one device, and what keys its random numbers.

    Attributes:
        name: used in error messages.
        param: the weights; mutated.
        grad: None where another optimizer has taken the step: u is then what came since the anchor.
        exp_avg: first moment, mutated; None without a gradient.
        exp_avg_sq: second moment, mutated; None without a gradient.
        step: 0-d fp32, the step count; incremented.
        tau: F(tau), dense or sparse; None for a plain AdamW step.
        tau_dense: tau before F, where something is projected onto it and F(tau) is another.
        anchor: of step-K, and of another optimizer's steps; mutated.
        master: fp32, or the int16 low halves of a bf16 parameter; mutated.
        tensor_id: keys the random numbers: `fused_merge.names.tensor_id` of the name.
        shard: what the tensors are of the unsharded ones.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Hyper, Operands, Shard, merge_rule, step_
        >>> w, m, v, step = torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(())
        >>> shard = Shard.whole(w.shape)
        >>> operands = Operands("w", w, torch.ones(2), m, v, step, None, None, None, None, 0, shard)  # plain AdamW
        >>> hyper = Hyper(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, alpha=0.5)
        >>> step_([operands], rule=merge_rule("ondare"), hyper=hyper)
        [None]
        >>> w, step
        (tensor([-0.1000, -0.1000]), tensor(1.))
    """

    name: str
    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    step: Tensor
    tau: Tau
    tau_dense: Tensor | None
    anchor: Anchor | None
    master: Tensor | None
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
