from __future__ import annotations

import pytest

from fused_merge.methods import METHODS, merge_rule


def test_defaults_of_the_rows():
    assert merge_rule("ondare", 0.25) == ("random", "random", "linear", 0.25, True)
    assert merge_rule("ondare", 0.25, rescale=False) == ("random", "random", "linear", 0.25, False)
    assert merge_rule("onties", 0.25) == ("magnitude", "magnitude", "sign_reference", 0.25, False)
    assert merge_rule("onties", 0.25, vote="paper").consensus == "sign_paper"


def test_only_a_rescaled_random_drop_scales():
    assert merge_rule("ondare", 0.25).scale(0.125) == 8.0
    assert merge_rule("ondare", 0.25, rescale=False).scale(0.125) == 1.0
    assert merge_rule("onties", 0.25).scale(0.125) == 1.0


def test_every_row_names_its_paper():
    assert all("arXiv" in row.paper for row in METHODS.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"method": "dare"}, r"unknown method 'dare'; the rows are 'ondare', 'onties'"),
        ({"method": "onties", "rescale": True}, r"'onties' has no option 'rescale'.*leave it out"),
        ({"method": "onties", "rescale": False}, r"'onties' has no option 'rescale'"),
        ({"method": "ondare", "vote": "paper"}, r"'ondare' has no option 'vote': its consensus is linear"),
        ({"method": "onties", "vote": "majority"}, r"vote must be 'reference' or 'paper', got 'majority'"),
        ({"method": "ondare", "reserve_rate": 0.0}, r"reserve_rate must lie in \(0, 1\], got 0.0"),
        ({"method": "ondare", "reserve_rate": 1.5}, r"reserve_rate must lie in \(0, 1\], got 1.5"),
        ({"method": "ondare", "reserve_rate": float("nan")}, r"reserve_rate must lie in \(0, 1\], got nan"),
    ],
)
def test_options_that_a_row_lacks(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_rule(**{"reserve_rate": 0.5} | arguments)
