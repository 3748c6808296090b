"""torchtitan: its container holds our optimizers beside torch's, saved and resumed as torchtitan does it."""

from __future__ import annotations

import pytest

pytest.importorskip("torchtitan")

import titan

both = pytest.mark.parametrize("mixed", [False, True], ids=["one optimizer", "two optimizers"])


@both
def test_the_container_takes_the_steps_of_its_optimizers(mixed, ranks_of):
    ranks_of(2).all(titan.train, "fsdp", mixed)


@both
def test_the_container_goes_on_with_another_number_of_processes(mixed, ranks_of, tmp_path):
    ranks_of(2).all(titan.save, "fsdp", mixed, tmp_path)
    ranks_of(4).all(titan.resume, "tp and fsdp", mixed, tmp_path)


def test_an_optimizer_that_neither_library_has_is_refused():
    from fused_merge.integrations.torchtitan import merging_adamw

    with pytest.raises(NotImplementedError, match="Optimizer OnXAdamW not added"):
        merging_adamw("tau.safetensors", optimizer_name="OnXAdamW").build(model_parts=[titan.Network()])
