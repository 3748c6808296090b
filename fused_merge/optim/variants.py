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
    Source: Lu et al. 2024 (arXiv 2405.17931), equation 4. Arguments, state and errors: `MergingAdamW`.

    Args:
        params, reference_delta, options: as in `MergingAdamW`.
        reserve_rate: p, in (0, 1].
        rescale: divide (1 - alpha)*F(u) and alpha*F(tau) by p, as in the authors' experiments; False is equation 4
            as printed.
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
    and ties. Source: Lu et al. 2024 (arXiv 2405.17931), equations 5-7. Arguments, state, errors: `MergingAdamW`.

    Args:
        params, reference_delta, options: as in `MergingAdamW`.
        reserve_rate: p, in (0, 1].
        vote: `"reference"`, of u and tau keep what has the sign of u + tau, then take the weighted sum, as in the
            authors' code; `"paper"`, of (1 - alpha)*u and alpha*tau keep the larger where their signs differ, as
            printed. With a small alpha these are two different optimizers.
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
    2001.06782, algorithm 1); on the flat reference delta it is this library's own. Arguments, state, errors:
    `MergingAdamW`.

    Args:
        params, reference_delta, options: as in `MergingAdamW`; the delta is dense, and `project` is `"conflict"` unless
            it is given.
    """

    def __init__(self, params: ParamsT, *, reference_delta: DeltaLike, **options: Unpack[CommonOptions]) -> None:
        super().__init__(params, reference_delta=reference_delta, method="onproj", **options)
