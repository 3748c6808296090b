"""Where the processes of these tests are: on the CPU with gloo, and with a GPU each."""

from __future__ import annotations

import pytest
from tensors import Tensors


@pytest.fixture(scope="session")
def compiled_once():
    """Compile here what several processes at once would otherwise compile each for itself."""
    for method in ("ondare", "onties", "onproj"):
        Tensors((300,)).step("compiled", method=method)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def where(request):
    if request.node.callspec.params.get("impl") == "compiled":
        if request.param == "cuda":
            pytest.skip("compiled code is for the CPU")
        request.getfixturevalue("compiled_once")
    return request.param
