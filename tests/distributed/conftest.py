"""Where the processes of these tests are: on the CPU with gloo, and with a GPU each."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def where(request):
    return request.param
