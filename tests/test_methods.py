from __future__ import annotations

import pytest

from fused_merge.methods import MERGE_METHODS, METHODS, check_coefficients, merge_method, merge_rule


def test_defaults_of_the_rows():
    assert merge_rule("ondare", 0.25)[:6] == ("random", "random", "linear", 0.25, 0.25, True)
    assert merge_rule("ondare", 0.25, rescale=False)[:6] == ("random", "random", "linear", 0.25, 0.25, False)
    assert merge_rule("onties", 0.25)[:6] == ("magnitude", "magnitude", "sign_reference", 0.25, 0.25, False)
    assert merge_rule("onproj")[:7] == ("none", "none", "linear", 1.0, 1.0, False, "conflict")
    assert merge_rule("onsoft", 0.25)[:6] == ("soft_threshold", "soft_threshold", "linear", 0.25, 0.25, False)
    assert merge_rule("ondare").reserve_rate == 0.01
    assert merge_rule("ondare", 0.25, tau_reserve_rate=0.5).tau_reserve_rate == 0.5
    assert merge_rule("onties", 0.25, vote="paper").consensus == "sign_paper"


def test_only_a_rescaled_random_drop_scales():
    assert merge_rule("ondare", 0.25).scale(0.125) == 8.0
    assert merge_rule("ondare", 0.25, rescale=False).scale(0.125) == 1.0
    assert merge_rule("onties", 0.25).scale(0.125) == 1.0


def test_every_row_names_its_paper():
    assert all("20" in row.paper or "19" in row.paper for row in METHODS.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"method": "dare"}, r"unknown method 'dare'; the methods are 'ondare', 'onties', 'onproj', 'onsoft'"),
        ({"method": "onties", "rescale": True}, r"'onties' has no option 'rescale'.*leave it out"),
        ({"method": "onties", "rescale": False}, r"'onties' has no option 'rescale'"),
        ({"method": "ondare", "vote": "paper"}, r"'ondare' has no option 'vote': its consensus is linear"),
        ({"method": "onties", "vote": "majority"}, r"vote must be None or 'reference' or 'paper', got 'majority'"),
        ({"method": "onproj"}, "method 'onproj' has no option 'reserve_rate': it keeps everything; leave it out"),
        ({"project": "away"}, "project must be None or 'conflict' or 'onto', got 'away'"),
        ({"project_over": "columns"}, "project_over must be 'tensor' or 'rows', got 'columns'"),
        ({"project_on": "moments"}, "project_on must be 'gradient' or 'update', got 'moments'"),
        ({"rounding": "up"}, "rounding must be 'nearest' or 'stochastic', got 'up'"),
        ({"project": "onto", "project_strength": 1.5}, r"project_strength must lie in \[0, 1\], got 1.5"),
        ({"project": "conflict", "project_strength": 0.5}, "project_strength is an option of project='onto'"),
        ({"method": "ondare", "reserve_rate": 0.0}, r"reserve_rate must lie in \(0, 1\], got 0.0"),
        ({"method": "ondare", "reserve_rate": 1.5}, r"reserve_rate must lie in \(0, 1\], got 1.5"),
        ({"method": "ondare", "reserve_rate": float("nan")}, r"reserve_rate must lie in \(0, 1\], got nan"),
    ],
)
def test_options_that_a_row_lacks(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_rule(**{"method": "ondare", "reserve_rate": 0.5} | arguments)


# --- merging of finished models

NAN, INF = float("nan"), float("inf")


def test_options_are_decided_by_the_method():
    assert all(merge_method(name) == MERGE_METHODS[name] for name in MERGE_METHODS)
    assert merge_method("ties", normalize=False).normalize is False
    assert merge_method("dare_ties", rescale=False).rescale is False
    assert merge_method("ties", scale=0.5).scale == 0.5


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tie", {}, "unknown merge method 'tie'; the methods are 'linear', 'slerp', 'nuslerp', 'nearswap', 'mod"),
        ("slerp", {"normalize": True}, "'slerp' has no option 'normalize': the models decide its weights; leave"),
        ("ties", {"rescale": True}, "'ties' has no option 'rescale': it drops nothing at random; leave it out"),
        ("ties", {"scale": INF}, "scale must be finite, got inf"),
        ("linear", {"scale": 2.0}, "'linear' has no option 'scale': it has no weighted sum of deltas; leave"),
        ("model_stock", {"scale": 2.0}, "'model_stock' has no option 'scale': it has no weighted sum of deltas"),
    ],
)
def test_options_that_a_merge_method_lacks(method, options, message):
    with pytest.raises(ValueError, match=message):
        merge_method(method, **options)


@pytest.mark.parametrize(
    ("method", "count", "weights", "densities", "message"),
    [
        ("ties", 0, [], None, "there is no model to merge; pass at least one"),
        ("slerp", 2, [0.5, 0.5], None, "'slerp' goes from the base to one model, got 2 models"),
        ("nearswap", 2, [0.5, 0.5], None, "'nearswap' goes from the base to one model, got 2 models"),
        ("nuslerp", 3, [1.0] * 3, None, "'nuslerp' goes from one model to another, got 3 besides a base"),
        ("nuslerp", 2, [0.5, -0.5], None, r"divides by the sum of \[0.5, -0.5\], which is 0; change one"),
        ("model_stock", 1, [1.0], None, "'model_stock' needs the angle between two models or more, got 1 model"),
        ("model_stock", 2, [1.0, 0.5], None, r"'model_stock' has no weights: .* give each model 1, not \[1.0, 0.5\]"),
        ("nearswap", 1, [-0.1], None, "t of method 'nearswap' is a distance and must not be negative, got -0.1"),
        ("ties", 2, [0.5], None, "2 models need as many weights, got 1"),
        ("ties", 1, [NAN], None, "a weight must be finite, got nan"),
        ("linear", 2, [0.5, -0.5], None, r"divides by the sum of \[0.5, -0.5\], which is 0; use normalize=False"),
        ("task_arithmetic", 1, [1.0], [0.5], "'task_arithmetic' has no option 'density': it keeps everything; leave"),
        ("ties", 2, [1.0, 1.0], [0.5], "2 models need as many densities, got 1"),
        ("ties", 1, [1.0], [0.0], r"density must lie in \(0, 1\], got 0.0"),
        ("dare_ties", 1, [1.0], [1.1], r"density must lie in \(0, 1\], got 1.1"),
        ("dare_ties", 1, [1.0], [NAN], r"density must lie in \(0, 1\], got nan"),
    ],
)
def test_coefficients_that_no_merge_can_use(method, count, weights, densities, message):
    with pytest.raises(ValueError, match=message):
        check_coefficients(merge_method(method), count, weights, densities)


@pytest.mark.parametrize(
    ("method", "densities", "margins", "message"),
    [
        ("della", None, [0.1], "epsilon changes nothing where everything is kept; give a density below 1, too"),
        ("breadcrumbs", [0.5], [0.1, 0.2], "1 models need as many margins, got 2"),
        ("breadcrumbs", [0.5], [1.0], r"gamma must lie in \[0, 1\), got 1.0"),
        ("breadcrumbs", [0.5], [-0.1], r"gamma must lie in \[0, 1\), got -0.1"),
        ("della", [0.5], [NAN], r"epsilon must lie in \[0, 1\), got nan"),
        ("della", [0.9], [0.2], r"density - epsilon must be above 0 and density \+ epsilon at most 1, got 0.9, 0.2"),
        ("della", [0.2], [0.2], r"density - epsilon must be above 0 and density \+ epsilon at most 1, got 0.2, 0.2"),
    ],
)
def test_margins_that_no_merge_can_use(method, densities, margins, message):
    with pytest.raises(ValueError, match=message):
        check_coefficients(merge_method(method), 1, [1.0], densities, margins)
    check_coefficients(merge_method(method), 1, [1.0], [1.0], [0.9])


@pytest.mark.parametrize("given", [True, False])
def test_methods_with_and_without_a_base(given):
    for name, method in MERGE_METHODS.items():
        if method.has_base in (given, None):
            assert merge_method(name).on_base(given).has_base == given
            continue
        with pytest.raises(ValueError, match=f"method {name!r} " + ("has no base" if given else "starts from a base")):
            method.on_base(given)


def test_weights_of_a_sum_may_cancel():
    check_coefficients(merge_method("linear", normalize=False), 2, [0.5, -0.5])
    check_coefficients(merge_method("task_arithmetic", normalize=True), 2, [0.5, -0.5])
