"""The table of methods: each consists of small named functions and is not a class.

A method names F of the update, F of the reference delta, the consensus ⊕ and a projection; the functions of those names
stand in `fused_merge.eager` and, fused, in `kernels`.
"""

from typing import TYPE_CHECKING, Annotated, NamedTuple, TypedDict

from fused_merge.options import Option, documented, one_of, resolve, within

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


def _check_rate(name: str, rate: float | None) -> float | None:
    if rate is not None and not 0.0 < rate <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {rate}")
    return rate


class ProjectionOptions(TypedDict, total=False):
    """The options that every method has."""

    project: Annotated[
        str | None,
        Option(
            None,
            '`"conflict"` removes from x its component along tau, c*tau with c = <x, tau> / <tau, tau>, where the step '
            'goes against tau; `"onto"` takes (1 - s)*x + s*c*tau; None projects nothing, or what the method implies. '
            "Needs the dense delta.",
            one_of(None, "conflict", "onto"),
        ),
    ]
    project_strength: Annotated[float, Option(1.0, 's of `"onto"`, in [0, 1].', within(0, 1))]
    project_over: Annotated[
        str,
        Option(
            "tensor",
            '`"tensor"`, or `"rows"`, one coefficient for each index along dim 0.',
            one_of("tensor", "rows"),
        ),
    ]
    project_on: Annotated[
        str,
        Option(
            "gradient",
            '`"gradient"`, before the moments, or `"update"`, after them: Adam rescales each element, so that only the '
            "latter keeps the step itself out of conflict.",
            one_of("gradient", "update"),
        ),
    ]
    rounding: Annotated[
        str,
        Option(
            "nearest",
            'of the weights: `"nearest"`, or `"stochastic"`, up or down with the probability of the distance; fp32 '
            "weights too, through the error of the sum.",
            one_of("nearest", "stochastic"),
        ),
    ]


class VariantOptions(ProjectionOptions, total=False):
    """Those too that only some methods have."""

    rescale: Annotated[
        bool | None,
        Option(
            None,
            "divide what a random drop keeps by p (as the authors' experiments did) or do not (equation 4); None is "
            "True where F is random. Methods without a random drop have no such option.",
        ),
    ]
    vote: Annotated[
        str | None,
        Option(
            None,
            '`"reference"` elects the sign of u + tau (the authors\' code), `"paper"` that of (1 - alpha)*u and '
            'alpha*tau (equations 5-7); None is `"reference"` where ⊕ is a sign vote. Methods without one have no such '
            "option.",
            one_of(None, "reference", "paper"),
        ),
    ]


class RuleOptions(VariantOptions, total=False):
    """All options that decide how u and tau are merged."""

    reserve_rate: Annotated[
        float | None,
        Option(
            None,
            "p, the share of elements that F keeps, in (0, 1]; None is 0.01, or everything for methods whose F drops "
            "nothing and which have no such option. A dense delta is sparsified once, with the rate that its group had "
            "when it was added; later changes act on u only.",
            _check_rate,
        ),
    ]


class MergeRule(NamedTuple):
    """A method with its options decided: all that a step needs to know besides tensors and scalars."""

    update: str
    tau: str
    consensus: str  # "linear", "sign_reference" or "sign_paper"
    reserve_rate: float  # of u
    tau_reserve_rate: float  # that tau was sparsified with
    rescale: bool
    project: str | None = None  # None, "conflict" or "onto"
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

    Raises:
        ValueError: for an unknown method, a number out of range, or an option that the method lacks.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(map(repr, METHODS))}")
    row = METHODS[method]
    o = resolve({"reserve_rate": reserve_rate, **options}, RuleOptions)
    rate, rescale, vote, project = o["reserve_rate"], o["rescale"], o["vote"], o["project"] or row.project
    if rate is not None and row.update == row.tau == "none":
        raise ValueError(f"method {method!r} has no option 'reserve_rate': it keeps everything; leave it out")
    if rescale is not None and row.update != "random":
        raise ValueError(f"method {method!r} has no option 'rescale': it drops nothing at random; leave it out")
    if vote is not None and row.consensus != "sign":
        raise ValueError(f"method {method!r} has no option 'vote': its consensus is {row.consensus}; leave it out")
    if o["project_strength"] != 1.0 and project != "onto":
        raise ValueError("project_strength is an option of project='onto'; a conflict is removed whole")
    if rate is None:
        rate = 1.0 if row.update == "none" else 0.01
    return MergeRule(
        update=row.update,
        tau=row.tau,
        consensus=f"sign_{vote or 'reference'}" if row.consensus == "sign" else row.consensus,
        reserve_rate=rate,
        tau_reserve_rate=rate if tau_reserve_rate is None else tau_reserve_rate,
        rescale=row.update == "random" if rescale is None else rescale,
        project=project,
        project_strength=o["project_strength"],
        project_over=o["project_over"],
        project_on=o["project_on"],
        rounding=o["rounding"],
    )
