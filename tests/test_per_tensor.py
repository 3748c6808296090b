"""What callers may write in several ways, and the sentence for what they may not."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_merge.per_tensor import parse_bytes, parse_dtype, per_tensor, plain

NAMES = ["model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", "model.norm.weight", "lm_head.weight"]
UP0, UP1, NORM, HEAD = NAMES
INF, NAN = float("inf"), float("nan")


# --- numbers by name


@pytest.mark.parametrize("number", [0.5, 1, True, np.float32(0.5), np.int64(3), torch.tensor(0.25), torch.tensor([2])])
def test_one_number_is_for_every_tensor(number):
    assert per_tensor(number, NAMES, what="ratio") == dict.fromkeys(NAMES, float(number))
    assert {type(value) for value in per_tensor(number, NAMES, what="ratio").values()} == {float}


def test_the_order_is_that_of_the_tensors():
    values = dict(zip(NAMES, [0.1, 0.2, 0.3, 0.4], strict=True))
    backwards = dict(reversed(values.items()))
    assert [*per_tensor(backwards, NAMES, what="ratio").items()] == [*values.items()]


def test_no_tensors_have_no_numbers():
    assert per_tensor(0.5, [], what="ratio") == per_tensor({}, [], what="ratio") == {}


def test_a_name_comes_before_every_expression_and_of_those_the_first_one_decides():
    value = {r"model\.layers\.\d+\..*": 0.2, ".*": 0.1, NORM: 0.3}
    assert per_tensor(value, NAMES, what="ratio") == {UP0: 0.2, UP1: 0.2, NORM: 0.3, HEAD: 0.1}


IDLE = "weight keys 'a', 'b', 'c' and 1 more match no tensor that an earlier key has not already taken; "
IDLE += f"keys are regular expressions on whole names, such as '{UP0}'"


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (INF, ValueError, "a weight must be finite, got inf"),
        ({".*": NAN}, ValueError, r"a weight of '\.\*' must be finite, got nan"),
        ("0.5", TypeError, "a weight must be a number, got '0.5'"),
        (np.str_("0.5"), TypeError, "a weight must be a number, got .*0.5"),
        (b"1", TypeError, "a weight must be a number, got b'1'"),
        (None, TypeError, "a weight must be a number, got None"),
        ([0.5], TypeError, r"a weight must be a number, got \[0.5\]"),
        (1j, TypeError, "a weight must be a number, got 1j"),
        ({".*": "0.5"}, TypeError, r"a weight of '\.\*' must be a number, got '0.5'"),
        ({"(": 0.5}, ValueError, r"weight key '\(' is not a regular expression: missing \)"),
        # Expressions are on whole names.
        (
            {"layers.0": 0.2, "mlp": 0.3},
            ValueError,
            f"no weight is given for '{UP0}'; add its name, or '.*' as the last",
        ),
        ({"head": 0.2, ".*": 0.3}, ValueError, "weight key 'head' matches no tensor"),
        ({".*": 0.1, r"model\..*": 0.2, NORM: 0.3}, ValueError, "weight key 'model.*' matches no tensor"),
        ({".*": 1, "a": 1, "b": 1, "c": 1, "d": 1}, ValueError, IDLE),
        ({3: 0.5}, ValueError, "weight key 3 is not a regular expression: first argument must be string"),
    ],
)
def test_values_that_are_not_for_these_tensors(value, kind, message):
    with pytest.raises(kind, match=message):
        per_tensor(value, NAMES, what="weight")


def test_a_key_without_any_tensor():
    with pytest.raises(ValueError, match="density key 'a' matches no tensor"):
        per_tensor({"a": 1}, [], what="density")


def test_plain_numbers_are_json():
    value = {"a": np.float32(0.1), "b": torch.tensor(2), "c": True}
    assert json.loads(json.dumps(plain(value, what="weight"))) == {"a": float(np.float32(0.1)), "b": 2.0, "c": 1.0}
    assert json.dumps(plain(np.float64(0.1), what="weight")) == "0.1"


@pytest.mark.parametrize("key", [3, None, re.compile("a")])
def test_keys_that_no_json_can_hold(key):
    with pytest.raises(TypeError, match=r"a weight is given for .*; keys are names or regular expressions, as strings"):
        plain({"b": 1, key: 0.5}, what="weight")


def reference_per_tensor(value, names):
    """The same, a name at a time; None where there is no answer."""
    decided, used = {}, set()
    for name in names:
        keys = [name] if name in value else [k for k in value if k not in names and re.fullmatch(k, name)]
        if not keys:
            return None
        decided[name] = value[keys[0]]
        used.add(keys[0])
    return decided if used == set(value) else None


PIECE = st.sampled_from(["a", "b", "c", "a.b", ".", ".*", "[ab]", "b+", "(a|c)"])
KEY = st.lists(PIECE, min_size=1, max_size=3).map("".join)


@given(
    value=st.dictionaries(KEY, st.floats(-2, 2), max_size=4),
    names=st.lists(st.text("abc.", min_size=1, max_size=4), max_size=6, unique=True),
)
def test_any_mapping_decides_as_one_name_at_a_time(value, names):
    want = reference_per_tensor(value, names)
    if want is None:
        with pytest.raises(ValueError, match=r"no ratio is given for|match(es)? no tensor"):
            per_tensor(value, names, what="ratio")
    else:
        assert per_tensor(value, names, what="ratio") == want


# --- dtypes


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_and_their_names(name):
    dtype = getattr(torch, name)
    assert parse_dtype(name) is parse_dtype(dtype) is parse_dtype(f"torch.{name}") is dtype
    assert parse_dtype(None) is None


@pytest.mark.parametrize("dtype", ["fp32", "int8", torch.int32, torch.complex64, torch.float8_e4m3fn, "", 16])
def test_dtypes_that_are_not_written(dtype):
    with pytest.raises(ValueError, match="out_dtype must be 'bfloat16', 'float16', 'float32', 'float64' or None, got"):
        parse_dtype(dtype, what="out_dtype")


# --- sizes


SIZES = {1: 1, 5_000_000_000: 5_000_000_000, 2.5e9: 2_500_000_000, "7": 7, "7B": 7, "5GB": 5 * 10**9, "5 gb": 5 * 10**9}
SIZES |= {
    " 256MiB ": 256 * 2**20,
    "1KiB": 2**10,
    "3kb": 3000,
    "0.5TB": 5 * 10**11,
    "2GiB": 2**31,
    "1e3": 1000,
    "1.5": 1,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text):
    assert parse_bytes(text, what="max_memory") == SIZES[text]


@pytest.mark.parametrize("text", [0, -1, "0.5B", "5G", "GB", "", "five", "1e30", "nan", "inf", "-3MB", "5GBB", None])
def test_what_is_no_size(text):
    sentence = f"max_memory must be a number of bytes such as 500000000 or '500MB', got {text!r}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_bytes(text, what="max_memory")
