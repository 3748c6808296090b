"""The reference delta that the tests of the optimizers share."""

from __future__ import annotations

import pytest
from models import Model, trained

import fused_merge as fm


@pytest.fixture
def delta() -> fm.ReferenceDelta:
    return fm.ReferenceDelta.from_models(Model(0), trained())
