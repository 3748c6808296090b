"""An optimizer as verl's `build_optimizer` makes it, beside one of named parameters, for `test_verl`."""

from __future__ import annotations

from importlib import import_module

from parallel import OPTIONS, assert_held, named, steps, tuned, wrapped

CONFIG = {"optimizer_impl": "fused_merge", "lr": OPTIONS["lr"], "weight_decay": OPTIONS["weight_decay"]}


def build_optimizer(parameters, config):
    cls = getattr(import_module(config["optimizer_impl"]), config["optimizer"])
    arguments = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
    if "adam" in config["optimizer"].lower():
        arguments["betas"] = (0.9, 0.999)
    return cls(parameters, **arguments, **config["override_optimizer_config"])


def steps_of_bare_parameters(rank, name, path):
    override = {"reference_delta": path, "alpha": 0.1, "reserve_rate": 0.5}
    config = CONFIG | {"optimizer": name, "override_optimizer_config": override}
    sharded, whole = wrapped(tuned(2), "fsdp"), tuned(2)
    ours = build_optimizer(sharded.parameters(), config)
    theirs = build_optimizer(named(whole).items(), config)
    for model, optimizer in ((sharded, ours), (whole, theirs)):
        steps(model, optimizer, 3)
    assert_held(sharded, ours, whole, theirs)
