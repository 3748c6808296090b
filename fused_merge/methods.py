"""The table of methods: each is a row of small named functions, not a class.

A row names F of the update, F of the reference delta and the consensus ⊕; the functions of those names stand
in `fused_merge.eager` and, fused, in `kernels`.
"""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """A row: theta += F_update(u) ⊕ F_tau(tau)."""

    update: str  # F of u: "none", "random" or "magnitude"
    tau: str  # F of tau, the same choice
    consensus: str  # "linear" or "sign"
    paper: str


METHODS: dict[str, Method] = {
    "ondare": Method("random", "random", "linear", "Lu et al. 2024 (arXiv 2405.17931), equation 4"),
    "onties": Method("magnitude", "magnitude", "sign", "Lu et al. 2024 (arXiv 2405.17931), equations 5-7"),
}

VOTES = ("reference", "paper")


class MergeRule(NamedTuple):
    """A row with its options decided: all that a step needs to know about the method."""

    update: str
    tau: str
    consensus: str  # "linear", "sign_reference" or "sign_paper"
    reserve_rate: float
    rescale: bool

    def scale(self, rate: float) -> float:
        """Return 1/rate under a rescaled random drop and 1 otherwise, so that the mean of F(x) is x or rate*x."""
        return 1.0 / rate if self.rescale else 1.0


def merge_rule(method: str, reserve_rate: float, *, rescale: bool | None = None, vote: str | None = None) -> MergeRule:
    """Look up a row of the table and decide its options.

    Args:
        method: a key of `METHODS`.
        reserve_rate: p, the share of elements that F keeps, in (0, 1].
        rescale: divide what a random drop keeps by p; None is True for rows that drop at random. Rows that do
            not drop at random have no such option.
        vote: `"reference"` (the authors' code) or `"paper"` (as printed); None is `"reference"` for rows
            with a sign vote. Rows without one have no such option.

    Raises:
        ValueError: for an unknown method or vote, a rate out of range, or an option that the row lacks.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the rows are {', '.join(map(repr, METHODS))}")
    row = METHODS[method]
    if not 0.0 < reserve_rate <= 1.0:
        raise ValueError(f"reserve_rate must lie in (0, 1], got {reserve_rate}")
    if rescale is not None and row.update != "random":
        raise ValueError(f"method {method!r} has no option 'rescale': it drops nothing at random; leave it out")
    if vote is not None and row.consensus != "sign":
        raise ValueError(f"method {method!r} has no option 'vote': its consensus is {row.consensus}; leave it out")
    if vote is not None and vote not in VOTES:
        raise ValueError(f"vote must be 'reference' or 'paper', got {vote!r}")
    return MergeRule(
        update=row.update,
        tau=row.tau,
        consensus=f"sign_{vote or 'reference'}" if row.consensus == "sign" else row.consensus,
        reserve_rate=reserve_rate,
        rescale=row.update == "random" if rescale is None else rescale,
    )
