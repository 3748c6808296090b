"""Options are written once: definitions, their checks, and the signatures, docstrings and commands made from them."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import fused_merge as fm
from fused_merge.adapt.options import AnswerOptions
from fused_merge.checkpoints.interpolate import plan_interpolation
from fused_merge.checkpoints.job import Job
from fused_merge.checkpoints.options import (
    FileOptions,
    InterpolateOptions,
    InterpolatePlanOptions,
    PlanOptions,
    RunOptions,
    described,
)
from fused_merge.merge.merge import plan_merge
from fused_merge.merge.mergekit import plan_mergekit
from fused_merge.merge.options import MergekitOptions, MergeOptions, MergePlanOptions
from fused_merge.optim.options import MergingOptions
from fused_merge.options import at_least, check_known, one_of, optional, options_of, resolve, split, within
from fused_merge.sweep.options import SweepOptions

FUNCTIONS = {
    fm.interpolate_checkpoints: InterpolateOptions,
    plan_interpolation: InterpolatePlanOptions,
    fm.merge_checkpoints: MergeOptions,
    plan_merge: MergePlanOptions,
    plan_mergekit: MergekitOptions,
    Job.run: RunOptions,
}
DEFAULTS = {"max_shard_size": None, "overwrite": False, "dtype": None, "unmatched": "error", "align_vocabulary": False}
DEFAULTS |= {"strip_prefix": (), "rename": (), "any_architecture": False}
DEFAULTS |= {"threads": None, "max_memory": None, "device": "cpu", "verify": False, "progress": True}
MERGE_DEFAULTS = {"density": None, "gamma": None, "epsilon": None, "normalize": None, "rescale": None, "scale": 1.0}
FILES_FROM = {"config_from": None, "tokenizer_from": None}
MERGE_DEFAULTS |= {"trim": "tensor", "seed": 0, **FILES_FROM}


@pytest.mark.parametrize(
    ("function", "arguments", "own"),
    [
        (fm.interpolate_checkpoints, ["base", "tuned", "ratios", "out"], FILES_FROM | {"impl": "auto"}),
        (fm.merge_checkpoints, ["base", "models", "method", "out"], MERGE_DEFAULTS),
    ],
)
def test_signatures_show_every_option_with_its_default(function, arguments, own):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.default is p.empty] == arguments
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert options == DEFAULTS | own
    assert all(p.annotation is not p.empty for p in parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_an_unknown_option_is_named_with_the_one_that_was_meant(function):
    name = next(iter(options_of(FUNCTIONS[function])))
    arguments = [None] * sum(p.default is p.empty for p in inspect.signature(function).parameters.values())
    with pytest.raises(TypeError, match=f"there is no option '{name}s'; did you mean '{name}'"):
        function(*arguments, **{f"{name}s": None})
    with pytest.raises(TypeError, match=f"there is no option 'zzz'; there are {name}"):
        function(*arguments, zzz=None)


@pytest.mark.parametrize("function", [fm.interpolate_checkpoints, fm.merge_checkpoints, plan_mergekit, Job.run])
def test_docstrings_explain_every_option(function):
    text = inspect.getdoc(function)
    assert "{options}" not in text
    for name, option in options_of(FUNCTIONS[function]).items():
        if name in inspect.signature(function).parameters:
            (found,) = re.findall(rf"^    {name}: (.*(?:\n        .*)*)", text, flags=re.MULTILINE)
            assert " ".join(found.split()) == option.doc
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("definition", [InterpolateOptions, MergeOptions])
def test_every_option_is_on_the_command_line_or_says_that_it_is_not(definition):
    assert [name for name, option in options_of(definition).items() if option.cli is None] == ["progress"]


def test_the_help_of_the_command_line_is_the_first_clause_of_a_text():
    assert options_of(MergeOptions)["seed"].summary == "Seed of the random masks."
    assert options_of(MergeOptions)["max_memory"].summary == "Memory limit for all buffers, such as 256MB."
    for option in options_of(InterpolateOptions, MergeOptions).values():
        assert re.fullmatch(r"[A-Z][^;`\"]{20,110}\.", option.summary), option.summary


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("dtype", "int8", ValueError, "dtype must be 'bfloat16', 'float16', 'float32', 'float64' or None, got 'int8'"),
        ("unmatched", "keep", ValueError, "unmatched must be 'error' or 'copy' or 'drop', got 'keep'"),
        ("max_shard_size", "big", ValueError, "max_shard_size must be a number of bytes such as .* got 'big'"),
        ("max_memory", 0, ValueError, "max_memory must be a number of bytes such as .* got 0"),
        ("threads", 0, ValueError, "threads must be at least 1, got 0"),
        ("scale", float("inf"), ValueError, "a scale must be finite, got inf"),
        ("scale", "1", TypeError, "a scale must be a number, got '1'"),
        ("seed", 1.5, TypeError, "seed must be an integer, got 1.5"),
        ("trim", "layer", ValueError, "trim must be 'tensor' or 'model', got 'layer'"),
    ],
)
def test_checks_name_the_option_and_the_value(name, value, error, message):
    with pytest.raises(error, match=message):
        resolve({name: value}, MergeOptions)


def test_resolved_options_are_as_they_are_used():
    found = resolve({"dtype": "bfloat16", "max_shard_size": "5GB", "threads": 3, "seed": torch.tensor(7)}, MergeOptions)
    changed = {"dtype": torch.bfloat16, "max_shard_size": 5 * 10**9, "threads": 3, "seed": 7, "rename": {}}
    assert found == DEFAULTS | MERGE_DEFAULTS | changed
    # What was resolved can be resolved again.
    assert resolve(found, MergeOptions) == found
    pairing = {"unmatched": "error", "align_vocabulary": False, "strip_prefix": (), "rename": {}}
    said = {"max_shard_size": 5 * 10**9, "dtype": "bfloat16", "any_architecture": False, **pairing}
    assert described(found) == said


def test_options_are_split_between_definitions():
    own = [{"dtype": 1, "overwrite": 3}, {"threads": 2}, {"overwrite": 3}]
    assert split({"dtype": 1, "threads": 2, "overwrite": 3}, PlanOptions, RunOptions, FileOptions) == own
    with pytest.raises(TypeError, match="there is no option 'thread'; did you mean 'threads'"):
        split({"thread": 2}, PlanOptions, RunOptions)


def test_checks():
    assert one_of("a", None)("x", None) is None
    assert at_least(1)("x", 1) == within(0, 1)("x", 1) == optional(at_least(1))("x", 1) == 1
    assert optional(at_least(1))("x", None) is None
    for check, message in [
        (one_of("a", None), "x must be 'a' or None, got 0.5"),
        (at_least(1), "x must be at least 1, got 0.5"),
        (within(1, 2), r"x must lie in \[1, 2\], got 0.5"),
        (optional(at_least(1)), "x must be at least 1, got 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            check("x", 0.5)
    check_known(["dtype"], options_of(PlanOptions))


def test_every_option_has_its_text():
    for each in (MergingOptions, InterpolateOptions, MergeOptions, SweepOptions, AnswerOptions):
        assert [name for name, option in options_of(each).items() if not option.doc.endswith(".")] == []
