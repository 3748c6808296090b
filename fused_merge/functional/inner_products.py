"""Inner products of many tensors, each one defined sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.sums import inner_product
from fused_merge.functional import backend
from fused_merge.functional.workspace import Workspace
from fused_merge.names import describe

# x, y and z of <s*x, y - z>.
Triple: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None]"


@torch.no_grad()
def inner_products(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor] | None = None,
    minus: Sequence[Tensor] | None = None,
    *,
    scale: float | Tensor = 1.0,
    workspace: Workspace | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """Return <s*x, y - z> of each of T tensors, without writing the difference; without `ys` <s*x, s*x>.

    Each is one defined sum, a binary tree over row-major neighbors, in fp32 (fp64 where a tensor is fp64): it does not
    depend on what else is summed, on block sizes or on the backend.

    Args:
        xs: T floating tensors of any shapes and strides.
        ys: T tensors of the same shapes and devices, in any floating dtypes.
        minus: z, the same; needs `ys`.
        scale: s, a float or a 0-d tensor that the host never reads; x is multiplied first.
        workspace: what calls with the same tensors share; None starts anew.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`. Compiled code serves bf16, fp16 and fp32 on a CPU, all
            tensors in one pass; `"auto"` chooses it where there is enough to do.

    Returns:
        T 0-d tensors, each where its tensor is.

    Raises:
        ValueError: for lists, shapes, dtypes or devices that do not match.
        RuntimeError: if what `impl` names cannot run here, or does not serve a tensor.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> xs, ys = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]
        >>> fm.functional.inner_products(xs, ys)
        [tensor(11.)]
        >>> fm.functional.inner_products(xs, ys, minus=xs)  # <x, y - x>
        [tensor(6.)]
    """
    if ys is None and minus is not None:
        raise ValueError("minus is subtracted from ys; pass both, or neither")
    nothing = [None] * len(xs)
    lengths = [len(column) for column in (xs, ys, minus) if column is not None]
    if lengths != [len(xs)] * len(lengths):
        raise ValueError(f"xs, ys and minus must have equally many tensors, got {lengths}")
    triples: list[Triple] = list(zip(xs, ys or nothing, minus or nothing, strict=True))
    for index, triple in enumerate(triples):
        x = triple[0]
        for other in triple:
            if other is None:
                continue
            if (other.shape, other.device) != (x.shape, x.device) or not other.is_floating_point():
                raise ValueError(
                    f"tensor {index}: {describe(x)} and {describe(other)} have no inner product; make shape and "
                    "device the same, and the dtypes floating"
                )

    names = [f"tensor {i}" for i in range(len(xs))]
    workspace = workspace or Workspace()
    chosen = backend.choose(impl, xs, [x.numel() for x in xs])
    reasons: Sequence[str | None] = [None] * len(xs)
    if "triton" in chosen.values():
        from fused_merge.kernels import sums

        reasons = [sums.why_unsupported(triple) for triple in triples]
    if "compiled" in chosen.values():
        from fused_merge.compiled import products as compiled_products
        from fused_merge.compiled.threads import Crew

        on_cpu = [x.device.type == "cpu" for x in xs]
        reasons = [
            compiled_products.why_unsupported(triple) if own else reason
            for triple, own, reason in zip(triples, on_cpu, reasons, strict=True)
        ]
    results: dict[int, Tensor] = {}
    for share in backend.group(impl, chosen, xs, names, reasons):
        own = [triples[i] for i in share.members]
        if share.backend == "triton":
            plan = workspace.keep(("products", share.device), sums.Plan)
            products = sums.inner_products(own, _on_device(scale, share.device), plan=plan)
        elif share.backend == "compiled":
            crew = workspace.keep("crew", Crew)
            products = compiled_products.inner_products(own, scale, crew)
        else:
            products = [_eager_product(*triple, scale) for triple in own]
        results.update(zip(share.members, products, strict=True))
    return [results[i] for i in range(len(xs))]


def _on_device(scale: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.to(device, torch.float32)
    # Filled and not copied: a copy of a number from the host would wait for the device.
    return torch.full((), scale, dtype=torch.float32, device=device)


def _eager_product(x: Tensor, y: Tensor | None, z: Tensor | None, scale: float | Tensor) -> Tensor:
    compute = compute_dtype(*(tensor.dtype for tensor in (x, y, z) if tensor is not None))
    x = (scale.to(x.device, compute) if isinstance(scale, Tensor) else scale) * x.to(compute)
    right = x if y is None else y.to(compute)
    return inner_product(x, right if z is None else right - z.to(compute))
