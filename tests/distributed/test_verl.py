"""verl's way of making an optimizer: a class by its name, bare sharded parameters, and options that are scalars."""

from __future__ import annotations

import parallel
import pytest
import verl_optimizer


@pytest.mark.parametrize("name", ["OnDAREAdamW", "OnTIESAdamW"])
def test_a_path_is_enough_for_bare_sharded_parameters(name, where, ranks_of, tmp_path):
    path = parallel.delta().save(tmp_path / "tau.safetensors")
    ranks_of(2, where).all(verl_optimizer.steps_of_bare_parameters, name, str(path))
