"""The two tables of methods: merging while training, and merging of finished models.

A method is not a class: it names small functions, which stand in `fused_merge.eager` and, fused, in `kernels`. A method
of training names F of the update, F of the reference delta, the consensus ⊕ and a projection. The equations of merging
finished models are in `fused_merge.eager.merge`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypedDict

from fused_merge.options import Option, definition, documented, one_of, optional, resolve, share, within

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Method(NamedTuple):
    """theta += F_update(u) ⊕ F_tau(tau)."""

    update: str  # F of u, a key of `fused_merge.eager.sparsify.SPARSIFY`
    tau: str  # F of tau, the same choice
    consensus: str  # "linear" or "sign"
    paper: str
    project: str | None = None  # the projection that the method implies; every method may ask for one


METHODS: dict[str, Method] = {
    "ondare": Method("random", "random", "linear", "Lu et al. 2024 (arXiv 2405.17931), equation 4"),
    "onties": Method("magnitude", "magnitude", "sign", "Lu et al. 2024 (arXiv 2405.17931), equations 5-7"),
    "onproj": Method("none", "none", "linear", "ours, after Yu et al. 2020 (arXiv 2001.06782)", project="conflict"),
    "onsoft": Method("soft_threshold", "soft_threshold", "linear", "ours, after Donoho 1995 and nearswap"),
}


@definition
class ProjectionOptions(TypedDict, total=False):
    """The options that every method has.

    Options:
        project: `"conflict"` removes from x its component along tau, c*tau with c = <x, tau> / <tau, tau>, where the
            step goes against tau; `"onto"` takes (1 - s)*x + s*c*tau; None projects nothing, or what the method
            implies. Needs the dense delta.
        project_strength: s of `"onto"`, in [0, 1].
        project_over: `"tensor"`, or `"rows"`, one coefficient for each index along dim 0.
        project_on: `"gradient"`, before the moments, or `"update"`, after them: Adam rescales each element, so that
            only the latter keeps the step itself out of conflict.
        rounding: of the weights: `"nearest"`, or `"stochastic"`, up or down with the probability of the distance; fp32
            weights too, through the error of the sum.
    """

    project: Annotated[str | None, Option(None, one_of(None, "conflict", "onto"))]
    project_strength: Annotated[float, Option(1.0, within(0, 1))]
    project_over: Annotated[str, Option("tensor", one_of("tensor", "rows"))]
    project_on: Annotated[str, Option("gradient", one_of("gradient", "update"))]
    rounding: Annotated[str, Option("nearest", one_of("nearest", "stochastic"))]


@definition
class VariantOptions(ProjectionOptions, total=False):
    """Those too that only some methods have.

    Options:
        rescale: divide what a random drop keeps by p (as the authors' experiments did) or do not (equation 4); None is
            True where F is random. Methods without a random drop have no such option.
        vote: `"reference"` elects the sign of u + tau (the authors' code), `"paper"` that of (1 - alpha)*u and
            alpha*tau (equations 5-7); None is `"reference"` where ⊕ is a sign vote. Methods without one have no such
            option.
    """

    rescale: Annotated[bool | None, Option(None)]
    vote: Annotated[str | None, Option(None, one_of(None, "reference", "paper"))]


@definition
class RuleOptions(VariantOptions, total=False):
    """All options that decide how u and tau are merged.

    Options:
        reserve_rate: p, the share of elements that F keeps, in (0, 1]; None is 0.01, or everything for methods whose F
            drops nothing and which have no such option. A dense delta is sparsified once, with the rate that its group
            had when it was added; later changes act on u only.
    """

    reserve_rate: Annotated[float | None, Option(None, optional(share))]


class MergeRule(NamedTuple):
    """A method with its options decided: all that a step needs to know besides tensors and scalars.

    `merge_rule` makes one.

    Attributes:
        update: F of u, a key of `fused_merge.eager.sparsify.SPARSIFY`.
        tau: F of tau, the same choice.
        consensus: ⊕: `"linear"`, `"sign_reference"` or `"sign_paper"`.
        reserve_rate: p, the share that F keeps of u.
        tau_reserve_rate: p that tau was sparsified with.
        rescale: whether what a random drop keeps is divided by p.
        project: None, `"conflict"` or `"onto"`.
        project_strength: s of `"onto"`.
        project_over: `"tensor"` or `"rows"`.
        project_on: `"gradient"` or `"update"`.
        rounding: of the weights: `"nearest"` or `"stochastic"`.

    Example:
        >>> import fused_merge as fm
        >>> rule = fm.functional.merge_rule("onties", reserve_rate=0.1)
        >>> rule.update, rule.consensus, rule.rescale
        ('magnitude', 'sign_reference', False)
        >>> fm.functional.merge_rule("ondare", reserve_rate=0.1).scale(0.1)  # of what a random drop keeps
        10.0
    """

    update: str
    tau: str
    consensus: str
    reserve_rate: float
    tau_reserve_rate: float
    rescale: bool
    project: str | None = None
    project_strength: float = 1.0
    project_over: str = "tensor"
    project_on: str = "gradient"
    rounding: str = "nearest"

    def scale(self, rate: float) -> float:
        """Return 1/rate under a rescaled random drop and 1 otherwise, so that the mean of F(x) is x or rate*x."""
        return 1.0 / rate if self.rescale else 1.0


@documented(RuleOptions)
def merge_rule(
    method: str,
    reserve_rate: float | None = None,
    *,
    tau_reserve_rate: float | None = None,
    **options: "Unpack[VariantOptions]",
) -> MergeRule:
    """Look up a method in the table and decide its options.

    Args:
        method: a key of `METHODS`.
        tau_reserve_rate: the rate that tau was sparsified with; None is `reserve_rate`.
        {options}

    Returns:
        The rule of the method, as `merging_adamw_` and `step_` take it.

    Raises:
        ValueError: for an unknown method, a number out of range, or an option that the method lacks.
        TypeError: for an option that there is not.

    Example:
        >>> import fused_merge as fm
        >>> fm.functional.merge_rule("onties", vote="paper").consensus
        'sign_paper'
        >>> fm.functional.merge_rule("onproj", project_over="rows").project
        'conflict'
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(map(repr, METHODS))}")
    chosen = METHODS[method]
    o = resolve({"reserve_rate": reserve_rate, **options}, RuleOptions)
    rate, rescale, vote, project = o["reserve_rate"], o["rescale"], o["vote"], o["project"] or chosen.project
    if rate is not None and chosen.update == chosen.tau == "none":
        raise ValueError(f"method {method!r} has no option 'reserve_rate': it keeps everything; leave it out")
    if rescale is not None and chosen.update != "random":
        raise ValueError(f"method {method!r} has no option 'rescale': it drops nothing at random; leave it out")
    if vote is not None and chosen.consensus != "sign":
        raise ValueError(f"method {method!r} has no option 'vote': its consensus is {chosen.consensus}; leave it out")
    if o["project_strength"] != 1.0 and project != "onto":
        raise ValueError("project_strength is an option of project='onto'; a conflict is removed whole")
    if rate is None:
        rate = 1.0 if chosen.update == "none" else 0.01
    return MergeRule(
        chosen.update,
        chosen.tau,
        f"sign_{vote or 'reference'}" if chosen.consensus == "sign" else chosen.consensus,
        rate,
        rate if tau_reserve_rate is None else tau_reserve_rate,
        chosen.update == "random" if rescale is None else rescale,
        project,
        *(o[name] for name in ("project_strength", "project_over", "project_on", "rounding")),
    )


class MergeMethod(NamedTuple):
    """theta = theta0 + scale * (F(tau_1) ⊕ ... ⊕ F(tau_K)); `merge_method` returns one whose options are decided."""

    name: str
    # F of each delta: "none", "random" or "magnitude" of `fused_merge.eager.sparsify.SPARSIFY`, "middle" (the largest
    # go, too) or "ranked" (at random, the small ones more often).
    sparsify: str
    elect: bool  # elect a sign before the sum; values of the other sign take no part
    normalize: bool  # divide by the sum of the weights, under a vote by that of the weights which agree
    rescale: bool  # divide what a random drop keeps by the probability of keeping it
    paper: str
    has_base: bool | None = True  # whether it starts from a base model; None leaves that to the caller
    # Where the weights of the sum come from: "given" by the caller; the "distance" of each element from the base; the
    # "base_arc" from the base to a model, or the "arc" from one model or its delta to another; "stock", the angles
    # between all deltas.
    weights_from: str = "given"
    scale: float = 1.0

    @property
    def deltas(self) -> bool:
        """Whether the sum is of differences from a base, else of the models themselves."""
        return bool(self.has_base) and self.weights_from != "base_arc"

    @property
    def takes_t(self) -> bool:
        """Whether it goes from the base to one model, whose weight is t."""
        return self.weights_from in ("base_arc", "distance")

    @property
    def has_angles(self) -> bool:
        """Whether inner products of whole tensors decide its weights."""
        return self.weights_from in ("base_arc", "arc", "stock")

    @property
    def has_thresholds(self) -> bool:
        """Whether magnitudes of whole tensors, or of whole models, decide what F keeps."""
        return self.sparsify in ("magnitude", "middle")

    @property
    def is_random(self) -> bool:
        """Whether F drops at random."""
        return self.sparsify in ("random", "ranked")

    def on_base(self, given: bool) -> "MergeMethod":
        """Return the method with or without a base; ValueError if it cannot do with that."""
        if self.has_base is None or self.has_base == given:
            return self._replace(has_base=given)
        way_out = "has no base; pass None, and it as a model" if given else "starts from a base; pass one"
        raise ValueError(f"method {self.name!r} {way_out}")


MERGE_METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod("linear", "none", False, True, False, "Wortsman et al. 2022 (arXiv 2203.05482)", has_base=False),
        MergeMethod("slerp", "none", False, False, False, "Shoemake 1985", weights_from="base_arc"),
        MergeMethod("nuslerp", "none", False, True, False, "Shoemake 1985", has_base=None, weights_from="arc"),
        MergeMethod("nearswap", "none", False, False, False, "alchemonaut 2024", weights_from="distance"),
        MergeMethod(
            "model_stock", "none", False, False, False, "Jang et al. 2024 (arXiv 2403.19522)", weights_from="stock"
        ),
        MergeMethod("task_arithmetic", "none", False, False, False, "Ilharco et al. 2023 (arXiv 2212.04089)"),
        MergeMethod("ties", "magnitude", True, True, False, "Yadav et al. 2023 (arXiv 2306.01708)"),
        MergeMethod("dare_linear", "random", False, False, True, "Yu et al. 2024 (arXiv 2311.03099)"),
        MergeMethod(
            "dare_ties", "random", True, False, True, "Yu et al. 2024 (arXiv 2311.03099), with a vote as in TIES"
        ),
        MergeMethod("breadcrumbs", "middle", False, False, False, "Davari & Belilovsky 2023 (arXiv 2312.06795)"),
        MergeMethod(
            *("breadcrumbs_ties", "middle", True, False, False),
            "Davari & Belilovsky 2023 (arXiv 2312.06795), with a vote as in TIES",
        ),
        MergeMethod("della", "ranked", True, True, True, "Deep et al. 2024 (arXiv 2406.11617)"),
        MergeMethod(
            "della_linear", "ranked", False, False, True, "Deep et al. 2024 (arXiv 2406.11617), without its vote"
        ),
    )
}

# The second number of an F beside its density: the name of the option, and its default.
MARGINS: dict[str, tuple[str, float]] = {"middle": ("gamma", 0.01), "ranked": ("epsilon", 0.15)}


def merge_method(
    name: str, *, normalize: bool | None = None, rescale: bool | None = None, scale: float = 1.0
) -> MergeMethod:
    """Look up a key of `MERGE_METHODS` and decide its options; ValueError for one that the method lacks."""
    if name not in MERGE_METHODS:
        raise ValueError(f"unknown merge method {name!r}; the methods are {', '.join(map(repr, MERGE_METHODS))}")
    method = MERGE_METHODS[name]
    if normalize is not None and method.weights_from != "given":
        raise ValueError(f"method {name!r} has no option 'normalize': the models decide its weights; leave it out")
    if rescale is not None and not method.is_random:
        raise ValueError(f"method {name!r} has no option 'rescale': it drops nothing at random; leave it out")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if scale != 1.0 and not (method.deltas and method.weights_from == "given"):
        raise ValueError(f"method {name!r} has no option 'scale': it has no weighted sum of deltas; leave it out")
    return method._replace(
        normalize=method.normalize if normalize is None else normalize,
        rescale=method.rescale if rescale is None else rescale,
        scale=scale,
    )


def check_count(method: MergeMethod, models: int) -> None:
    """Raise ValueError if a method cannot merge so many models, besides the base."""
    if models < 1:
        raise ValueError("there is no model to merge; pass at least one")
    if method.takes_t and models != 1:
        raise ValueError(f"method {method.name!r} goes from the base to one model, got {models} models")
    if method.weights_from == "arc" and models != 2:
        raise ValueError(f"method {method.name!r} goes from one model to another, got {models} besides a base")
    if method.weights_from == "stock" and models < 2:
        raise ValueError(f"method {method.name!r} needs the angle between two models or more, got 1 model")


def check_coefficients(
    method: MergeMethod,
    models: int,
    weights: Sequence[float],
    densities: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
) -> None:
    """Raise ValueError for the first number that has no use: a weight or t, a density, a gamma or epsilon.

    There is one of each for every model besides the base.
    """
    check_count(method, models)
    if len(weights) != models:
        raise ValueError(f"{models} models need as many weights, got {len(weights)}")
    if (odd := next((weight for weight in weights if not math.isfinite(weight)), None)) is not None:
        raise ValueError(f"a weight must be finite, got {odd}")
    if method.weights_from == "distance" and weights[0] < 0:
        raise ValueError(f"t of method {method.name!r} is a distance and must not be negative, got {weights[0]}")
    if method.weights_from == "stock" and set(weights) != {1.0}:
        raise ValueError(f"method {method.name!r} has no weights: angles decide; give each model 1, not {[*weights]}")
    if method.normalize and (method.weights_from == "arc" or not method.deltas) and abs(sum(weights)) < 1e-8:
        way_out = "use normalize=False" if method.weights_from == "given" else "change one"
        raise ValueError(f"a mean of models divides by the sum of {list(weights)}, which is 0; {way_out}")
    option, _ = MARGINS.get(method.sparsify, ("", 0.0))
    if densities is None:
        if margins is not None:
            raise ValueError(f"{option} changes nothing where everything is kept; give a density below 1, too")
        return
    if method.sparsify == "none":
        raise ValueError(f"method {method.name!r} has no option 'density': it keeps everything; leave it out")
    for what, numbers in (("densities", densities), ("margins", margins)):
        if numbers is not None and len(numbers) != models:
            raise ValueError(f"{models} models need as many {what}, got {len(numbers)}")
    for density in densities:
        share("density", density)
    for density, margin in zip(densities, margins or (), strict=False):
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"{option} must lie in [0, 1), got {margin}")
        if option == "epsilon" and density < 1.0 and not margin < density <= 1.0 - margin:
            raise ValueError(
                f"density - epsilon must be above 0 and density + epsilon at most 1, got {density}, {margin}"
            )
