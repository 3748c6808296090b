"""Lists of tensors as the multi-tensor step takes them, mid-run."""

from __future__ import annotations

import torch
from bits import assert_same_bits
from device import DEVICE

from fused_merge import functional
from fused_merge.eager.scalars import Hyper
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import sparsify_tau
from fused_merge.methods import merge_rule
from fused_merge.names import tensor_id

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.05}
# The fields that hold a tensor of the shape of each parameter.
WHOLE = ("params", "grads", "exp_avgs", "exp_avg_sqs", "taus")


class Tensors:
    """Parameters, gradients, states and deltas of some sizes; `clone` for the other backend."""

    def __init__(self, *shapes, dtype=torch.float32, grad_dtype=None, tau=torch.float32, sparse=False):
        generator = torch.Generator().manual_seed(0)

        def draw(scale, dtype=torch.float32):
            return [(scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE) for shape in shapes]

        self.params, self.grads = draw(1.0, dtype), draw(0.1, grad_dtype or dtype)
        self.exp_avgs, self.exp_avg_sqs = draw(0.1), [x.square() for x in draw(0.1)]
        self.steps = [torch.tensor(4.0, device=DEVICE) for _ in shapes]
        names = [f"layers.{i}.weight" for i in range(len(shapes))]
        self.tensor_ids = [tensor_id(name) for name in names]
        self.taus = [None] * len(shapes) if tau is None else draw(1e-2, tau)
        if sparse:
            kept = [
                sparsify_tau(tau, name=name, method="random", reserve_rate=0.1, seed=3)
                for tau, name in zip(self.taus, names, strict=True)
            ]
            self.taus = [SparseTensor.pack(tau, tau != 0) for tau in kept]

    def clone(self):
        other = object.__new__(Tensors)
        other.__dict__ = {
            key: [x.clone() if isinstance(x, torch.Tensor) else x for x in values]
            for key, values in self.__dict__.items()
        }
        return other

    def start(self):
        """Begin anew: no step taken, no moments."""
        for state in (*self.exp_avgs, *self.exp_avg_sqs, *self.steps):
            state.zero_()

    def step(self, impl, lists=None, **options):
        """Take a step; `lists` overrules columns, and options are those of rule, hyper-parameters and step."""
        options = HYPER | {"method": "ondare", "seed": 3} | options
        if options["method"] != "onproj":
            options.setdefault("reserve_rate", 0.1)
        step = {key: options.pop(key) for key in ("seed", "shards", "workspace", "anchors") if key in options}
        hyper = Hyper(**{key: options.pop(key) for key in Hyper._fields if key in options})
        columns = self.__dict__ | (lists or {})
        functional.merging_adamw_(**columns, rule=merge_rule(**options), hyper=hyper, impl=impl, **step)

    def outputs(self):
        return {key: getattr(self, key) for key in ("params", "exp_avgs", "exp_avg_sqs", "steps")}


def run_both(tensors, steps=2, **options):
    """Step by the kernels and by the eager code, and see that both write the same bits."""
    by_eager = tensors.clone()
    for _ in range(steps):
        tensors.step("triton", **options)
        by_eager.step("eager", **options)
    assert_same_bits(tensors.outputs(), by_eager.outputs())
    return tensors
