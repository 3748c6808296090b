"""Which steps hold the kernels and the eager code together: methods by storages of tau, and every pair of all options.

A case is legal if the library takes it and none of its options is idle, as `project_over` is without a projection.
"""

from __future__ import annotations

from collections import namedtuple
from inspect import signature
from itertools import combinations, product

DTYPES = ("fp32", "bf16", "fp16")

# The first legal value is the default.
OPTIONS = {
    "method": ("ondare", "onties", "onties-paper", "onproj", "onsoft"),
    "tau": (*DTYPES, *(f"sparse-{dtype}" for dtype in DTYPES), "none"),
    "reserve_rate": (0.3, 0.02, 1.0, None),
    "rescale": (True, False),
    "project": ("none", "conflict", "onto", "onto-0.3"),
    "project_over": ("tensor", "rows"),
    "project_on": ("gradient", "update"),
    "tau_dense": ("none", *DTYPES),
    "weights": DTYPES,
    "master": ("none", "fp32", "split"),
    "rounding": ("nearest", "stochastic"),
    "grad": DTYPES,
    "exp_avg": DTYPES,
    "exp_avg_sq": DTYPES,
    "merge_every": (None, 1, 3),  # with an anchor, or None without one
    # By AdamW, or by another optimizer, with an anchor for all steps or for one.
    "stepped": ("here", "elsewhere", "elsewhere-once"),
    "eps": (1e-8, 0.0),
    "weight_decay": (0.1, 0.0),
    "alpha": (1e-2, 0.5, 0.0, 1.0),
    "lr": ("float", "zero", "tensor"),
    "grad_factor": (1.0, -0.5, "tensor"),
    "found_inf": ("absent", "clear", "overflow"),
    "statistics": (False, True),
    "shard": ("whole", "rows", "columns"),
    "alignment": ("aligned", "shifted"),
    "layout": ("contiguous", "permuted", "strided"),
    "edge": ("empty", "scalar", "block"),  # of the shapes
    "special": ("none", "nonfinite", "ties", "zeros", "zero-delta", "signed-zeros", "tiny"),
}

Case = namedtuple("Case", OPTIONS)

LAWS = (
    lambda method, reserve_rate: (method == "onproj") == (reserve_rate is None),
    lambda method, rescale: rescale or method == "ondare",
    lambda tau, rescale: rescale or tau != "none",
    lambda method, project: method != "onproj" or project != "none",
    lambda project, project_over: project != "none" or project_over == "tensor",
    lambda project, project_on: project != "none" or project_on == "gradient",
    lambda project, tau_dense: project != "none" or tau_dense == "none",
    lambda tau, tau_dense: tau != "none" or tau_dense == "none",
    lambda tau, project, tau_dense: project == "none" or tau_dense != "none" or not tau.startswith("sparse"),
    lambda weights, master: weights == "bf16" or master == "none" or (weights, master) == ("fp16", "fp32"),
    lambda master, rounding: master == "none" or rounding == "nearest",
    lambda stepped, tau: stepped == "here" or tau != "none",
    lambda stepped, merge_every: stepped == "here" or merge_every in ((1, 3) if stepped == "elsewhere" else (1,)),
    lambda stepped, project, project_on: stepped == "here" or project == "none" or project_on == "update",
    # What another optimizer has used up is not seen.
    lambda stepped, grad: stepped == "here" or grad == "fp32",
    lambda stepped, exp_avg: stepped == "here" or exp_avg == "fp32",
    lambda stepped, exp_avg_sq: stepped == "here" or exp_avg_sq == "fp32",
    lambda stepped, eps: stepped == "here" or eps == 1e-8,
    lambda stepped, weight_decay: stepped == "here" or weight_decay == 0.1,
    lambda stepped, lr: stepped == "here" or lr == "float",
    lambda stepped, grad_factor: stepped == "here" or grad_factor == 1.0,
)
NAMED_LAWS = {tuple(signature(law).parameters): law for law in LAWS}

# Beside one of these other options do not show: a case counts for the pairs that hold all of these that it has.
SILENT = {("tau", "none"), ("reserve_rate", 1.0), ("alpha", 0.0), ("alpha", 1.0)}


def legal(chosen):
    """Return whether the options that are chosen so far, name to value, can go together."""
    return all(law(*map(chosen.get, names)) for names, law in NAMED_LAWS.items() if chosen.keys() >= set(names))


def pairs_shown(case):
    """Return the pairs of (name, value) that a case covers."""
    silent = SILENT & case.items()
    return {pair for pair in map(frozenset, combinations(case.items(), 2)) if silent <= pair}


def complete(chosen, wanted=()):
    """Return the legal case that goes on from `chosen` and shows many pairs `wanted`, or None where there is none."""
    name = next((name for name in OPTIONS if name not in chosen), None)
    if name is None:
        return chosen
    beside = SILENT & chosen.items() or chosen.items()

    def gain(value):
        return sum(frozenset({(name, value), other}) in wanted for other in beside)

    # Where many gain the same, not always the first.
    turn = len(wanted) % len(OPTIONS[name])
    values = [value for value in OPTIONS[name][turn:] + OPTIONS[name][:turn] if (name, value) not in SILENT]
    for value in sorted(values, key=gain, reverse=True):
        more = chosen | {name: value}
        if legal(more) and (case := complete(more, wanted)):
            return case
    return None


def every_pair():
    """Return every pair of (name, value) of two options, legal or not."""
    columns = [[(name, value) for value in values] for name, values in OPTIONS.items()]
    return [frozenset(pair) for two in combinations(columns, 2) for pair in product(*two)]


def cover(exact, begun):
    """Return cases: defaults beside the `exact` ones, and what shows most pairs beside those `begun` and in more."""
    cases = [complete(chosen) for chosen in exact]
    shown = set().union(*map(pairs_shown, cases))
    wanted = dict.fromkeys(pair for pair in every_pair() if pair not in shown)
    begun = iter(begun)
    while (chosen := next(begun, None)) or wanted:
        first = chosen or dict(next(iter(wanted)))
        case = complete(first, wanted)
        cases += [case] if case else []
        for pair in pairs_shown(case) if case else [frozenset(first.items())]:
            wanted.pop(pair, None)
    return cases


def named(case):
    """Return a name of what tells most cases apart."""
    told = [case[name] for name in ("special", "stepped") if case[name] != OPTIONS[name][0]]
    return "-".join([case["method"], case["tau"], *told])


METHODS = [
    *({"method": method, "tau": tau} for method, tau in product(OPTIONS["method"], OPTIONS["tau"])),
    *({"method": method, "special": x} for method, x in product(OPTIONS["method"], OPTIONS["special"][1:])),
    # Half and half, opposite terms of the same magnitude cancel.
    {"method": "onties-paper", "special": "ties", "alpha": 0.5},
]
RARE = {"tau": "sparse-bf16", "reserve_rate": 0.02, "weight_decay": 0.0}
NOISY = {"weights": "bf16", "rounding": "stochastic", "special": "nonfinite"}
BY_ROWS = {"method": "onproj", "project_over": "rows"}
# The compiled forms that pairs of options reach by chance alone: a row in one pass, weights that are skipped, and the
# moments of a ranked F that are stored before it is known what is kept.
FORMS = [
    *(BY_ROWS | {"tau": tau, "project_on": on} for tau, on in product(("bf16", "fp32"), OPTIONS["project_on"])),
    BY_ROWS | {"method": "ondare", "project": "onto-0.3", "weights": "bf16", "rounding": "stochastic", "shard": "rows"},
    BY_ROWS | {"found_inf": "overflow", "eps": 0.0},
    BY_ROWS | {"lr": "zero", "special": "signed-zeros"},
    *(RARE | {"method": method} for method in ("ondare", "onties", "onsoft")),
    *(RARE | {"method": method, "weight_decay": 0.1, "eps": 0.0} for method in ("ondare", "onties", "onsoft")),
    *(RARE | NOISY | {"method": method} for method in ("ondare", "onties")),
    *(RARE | {"method": method, "lr": "zero", "special": "nonfinite"} for method in ("onties", "onsoft")),
    *(RARE | {"method": method, "found_inf": "overflow"} for method in ("ondare", "onties")),
    *(
        RARE | {"project": "conflict", "tau_dense": "bf16", "project_on": on} | method
        for method in ({"method": "onties"}, {"method": "ondare", "project_over": "rows"})
        for on in OPTIONS["project_on"]
    ),
    RARE | {"method": "ondare", "shard": "columns"},
    *(BY_ROWS | {"stepped": stepped, "project_on": "update"} for stepped in OPTIONS["stepped"][1:]),
    RARE | {"method": "onties", "stepped": "elsewhere", "statistics": True, "weight_decay": 0.1},
    RARE | {"method": "onsoft", "project": "onto", "project_over": "rows", "project_on": "update", "tau_dense": "fp32"},
]
CASES = {f"{number}-{named(case)}": Case(**case) for number, case in enumerate(cover(FORMS, METHODS))}
