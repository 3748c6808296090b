from __future__ import annotations

import pytest

from fused_merge.methods import METHODS, merge_rule


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
