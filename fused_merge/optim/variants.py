"""`MergingAdamW` by the names of its methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import ParamsT

from fused_merge.optim.merging_adamw import DeltaLike, MergingAdamW
from fused_merge.optim.options import CommonOptions
from fused_merge.options import documented

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(CommonOptions)
class OnDAREAdamW(MergingAdamW):
    """AdamW with random drop and linear consensus: theta += (1 - alpha)*F(u) + alpha*F(tau).

    F keeps each element with probability p = `reserve_rate`, independently at every step for u and once for tau.
    Source: Lu et al. 2024 (arXiv 2405.17931), equation 4. Other options, state and errors: `MergingAdamW`.

    Args:
        params: `model.named_parameters()`, or parameter groups of such pairs.
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        reserve_rate: p, in (0, 1].
        rescale: divide (1 - alpha)*F(u) and alpha*F(tau) by p, as in the authors' experiments; False is equation 4
            as printed.

    Example:
        >>> import copy
        >>> import torch
        >>> import fused_merge as fm
        >>> model = torch.nn.Linear(4, 2)
        >>> delta = fm.ReferenceDelta.from_models(torch.nn.Linear(4, 2), model)
        >>> plain = copy.deepcopy(model)
        >>> options = {"lr": 1e-3, "alpha": 0.0, "reserve_rate": 1.0}  # nothing is merged
        >>> ours = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, **options)
        >>> for trained, optimizer in (model, ours), (plain, torch.optim.AdamW(plain.parameters(), weight_decay=0.0)):
        ...     trained(torch.ones(4)).sum().backward()
        ...     optimizer.step()
        >>> torch.allclose(model.weight, plain.weight)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        reference_delta: DeltaLike,
        reserve_rate: float = 0.01,
        rescale: bool = True,
        **options: Unpack[CommonOptions],
    ) -> None:
        own: Any = {"reserve_rate": reserve_rate, "rescale": rescale}
        super().__init__(params, reference_delta=reference_delta, method="ondare", **own, **options)


@documented(CommonOptions)
class OnTIESAdamW(MergingAdamW):
    """AdamW with top-p by magnitude and sign consensus.

    F keeps, per tensor, what is at least as large as the k-th largest magnitude, k = max(1, floor(p*n)). The very
    first updates of Adam all have magnitude lr up to rounding, so what the first step keeps is chosen by rounding
    and ties. Source: Lu et al. 2024 (arXiv 2405.17931), equations 5-7. Other options, state and errors: `MergingAdamW`.

    Args:
        params: `model.named_parameters()`, or parameter groups of such pairs.
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        reserve_rate: p, in (0, 1].
        vote: `"reference"`, of u and tau keep what has the sign of u + tau, then take the weighted sum, as in the
            authors' code; `"paper"`, of (1 - alpha)*u and alpha*tau keep the larger where their signs differ, as
            printed. With a small alpha these are two different optimizers.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> delta = fm.ReferenceDelta.from_models({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -1.0])})
        >>> options = {"lr": 0.1, "alpha": 0.5, "reserve_rate": 1.0}
        >>> optimizer = fm.OnTIESAdamW([("w", w)], reference_delta=delta, **options)
        >>> w.grad = torch.ones(2)
        >>> optimizer.step()  # u = -0.1 loses the vote against tau = 1, and agrees with tau = -1
        >>> w.detach()
        tensor([ 0.5000, -0.5500])
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        reference_delta: DeltaLike,
        reserve_rate: float = 0.01,
        vote: str = "reference",
        **options: Unpack[CommonOptions],
    ) -> None:
        own: Any = {"reserve_rate": reserve_rate, "vote": vote}
        super().__init__(params, reference_delta=reference_delta, method="onties", **own, **options)


@documented(CommonOptions)
class OnProjAdamW(MergingAdamW):
    """AdamW whose step is kept out of conflict with the reference delta, or drawn onto it.

    c = <x, tau> / <tau, tau>, over the tensor or over each row, of the gradient or of the update; then
    theta += (1 - alpha)*u + alpha*tau. The removal of conflicting components is that of PCGrad (Yu et al. 2020, arXiv
    2001.06782, algorithm 1); on the flat reference delta it is this library's own. `project` is `"conflict"` unless it
    is given. Other options, state and errors: `MergingAdamW`.

    Args:
        params: `model.named_parameters()`, or parameter groups of such pairs.
        reference_delta: a `ReferenceDelta`, or the path of a saved one; dense.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> w, tau = torch.nn.Parameter(torch.zeros(2)), torch.tensor([1.0, -1.0])
        >>> delta = fm.ReferenceDelta.from_models({"w": torch.zeros(2)}, {"w": tau})
        >>> optimizer = fm.OnProjAdamW([("w", w)], reference_delta=delta, lr=0.1, alpha=0.0)
        >>> w.grad = torch.tensor([1.0, 0.0])  # a step down this gradient goes against tau
        >>> optimizer.step()
        >>> w.detach() @ tau  # the step that was taken does not
        tensor(0.)
    """

    def __init__(self, params: ParamsT, *, reference_delta: DeltaLike, **options: Unpack[CommonOptions]) -> None:
        super().__init__(params, reference_delta=reference_delta, method="onproj", **options)
