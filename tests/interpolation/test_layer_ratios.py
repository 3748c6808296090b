"""`LayerRatios`: from models and names, by pattern, kind and tensor; the value, its text form, its users."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import sys

import pytest
import torch
from bits import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import llama, save

from fused_merge import functional
from fused_merge.checkpoints.interpolate import interpolate_checkpoints
from fused_merge.interpolation.layer_ratios import LayerRatios
from fused_merge.merge.merge import merge_checkpoints
from fused_merge.per_tensor import per_tensor


def layers(count: int, rest: tuple[str, ...] = ("self_attn.q_proj.weight",)) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(count) for name in rest]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_its_state_dict_and_its_checkpoint_say_the_same(tied, tmp_path):
    model = llama(0, tied=tied)
    folder = save(model, tmp_path / "model", shard="3KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ratios = LayerRatios.by_parts(model, [0.2, 0.9])
    names = [name for name, _ in model.named_parameters()]
    for source in (model.state_dict(), folder, str(folder), iter(names)):
        assert LayerRatios.by_parts(source, [0.2, 0.9]) == ratios
    assert ("lm_head.weight" in ratios) != tied
    assert set(ratios) == set(names)


def test_integers_have_no_ratio_and_floating_buffers_have():
    tensors = {name: torch.zeros(1) for name in layers(1)}
    model = tensors | {"model.layers.0.attn.bias": torch.ones(1), "embed.position_ids": torch.arange(3)}
    assert list(LayerRatios.by_parts(model, [0.5])) == [*tensors, "model.layers.0.attn.bias"]
    with pytest.raises(ValueError, match="there is no floating tensor to give a ratio"):
        LayerRatios.by_parts({"layers.0.w": torch.arange(3)}, [0.5])
    with pytest.raises(FileNotFoundError, match="no/where does not exist"):
        LayerRatios.by_parts("no/where", [0.5])


NAMES = [
    "model.embed_tokens.weight",
    *layers(2, ("self_attn.q_proj.weight", "mlp.up_proj.weight")),
    "model.norm.weight",
]
EMBED, Q0, UP0, Q1, UP1, NORM = NAMES


def test_parts_by_patterns():
    keys = {UP0: 0.1, r".*layers\.\d\.mlp.*": 0.2, ".*q_proj.*": 0.3, ".*": 0.4}
    ratios = LayerRatios.by_patterns(NAMES, keys)
    assert dict(ratios.parts) == dict(zip(keys, [(UP0,), (UP1,), (Q0, Q1), (EMBED, NORM)], strict=True))
    assert ratios.ratios == (0.1, 0.2, 0.3, 0.4)


def test_parts_by_kind():
    ratios = LayerRatios.by_kind(NAMES, {"mlp": 0.6, "attention": 0.3, "other": 0.5})
    assert dict(ratios.parts) == {"mlp": (UP0, UP1), "attention": (Q0, Q1), "other": (EMBED, NORM)}
    assert ratios.ratios == (0.6, 0.3, 0.5)
    strange = LayerRatios.by_kind([*NAMES, "model.layers.0.scale"], {"embeddings": 1, "norm": 2, "other": 3})
    assert strange.parts["other"] == (Q0, UP0, Q1, UP1, "model.layers.0.scale")


def test_a_part_for_each_tensor():
    assert dict(LayerRatios.per_tensor(NAMES, 0.5).parts) == {name: (name,) for name in NAMES}
    assert set(LayerRatios.per_tensor(NAMES, 0.5).ratios) == {0.5}
    ratios = LayerRatios.per_tensor(NAMES, {Q1: 0.7, ".*": 0.1})
    assert ratios.ratios == (0.1, 0.1, 0.1, 0.7, 0.1, 0.1)
    assert dict(LayerRatios.per_tensor(NAMES, LayerRatios.by_parts(NAMES, [0.1, 0.2]))) == {
        name: 0.1 if name in (EMBED, Q0, UP0) else 0.2 for name in NAMES
    }


KINDS = {"embeddings": 1, "attention": 2, "mlp": 3, "norm": 4}


@pytest.mark.parametrize(
    ("make", "more", "ratios", "sentence"),
    [
        ("by_patterns", "", {".*mlp.*": 0.1}, f"no ratio is given for {EMBED!r}; add its name, or '.*' as the last"),
        ("by_patterns", "", {".*": 0.1, Q0[:-1]: 0.2}, r"ratio key 'model\S*weigh' matches no tensor"),
        ("by_patterns", "", {"(": 0.1, ".*": 1}, r"ratio key '\(' is not a regular expression"),
        ("by_patterns", "", {".*": math.inf}, r"a ratio of '\.\*' must be finite, got inf"),
        ("by_kind", "", {"mlp": 0.1}, f"{EMBED!r} is of the kind 'embeddings', which has no ratio; add it"),
        ("by_kind", "", {"head": 0.1, "other": 0.2}, "no tensor is of the kind 'head'; leave it out"),
        ("by_kind", "", {"norm": 0.1, "MLP": 0.2}, "there is no kind 'MLP'; kinds are 'embeddings', 'attention', "),
        ("by_kind", "scale", KINDS, "cannot tell what kind 'scale' is; give a ratio for 'other', or use by_patterns"),
        ("by_kind", "model.layers.0.x", KINDS, r"cannot tell what kind 'model\.layers\.0\.x' is"),
        ("per_tensor", "", {Q0: 0.1}, f"no ratio is given for {EMBED!r}"),
        ("per_tensor", "", math.nan, "a ratio must be finite, got nan"),
    ],
)
def test_settings_that_do_not_fit(make, more, ratios, sentence):
    with pytest.raises(ValueError, match=sentence):
        getattr(LayerRatios, make)([*NAMES, more] if more else NAMES, ratios)


def test_a_mapping_that_does_not_change():
    ratios = LayerRatios({"low": ["a", "module.b.w"], "high": ["c"]}, [0.25, 1], history=[{"step": 1}])
    assert dict(ratios) == {"a": 0.25, "b.w": 0.25, "c": 1.0}
    assert len(ratios) == 3
    assert "module.b.w" not in ratios
    assert (ratios.ratios, ratios.mean, ratios.history) == ((0.25, 1.0), 0.625, ({"step": 1},))
    for attribute in ("parts", "ratios", "mean"):
        with pytest.raises(AttributeError):
            setattr(ratios, attribute, None)
    for mapping in (ratios, ratios.parts):
        with pytest.raises(TypeError):
            mapping["a"] = 0.5
    other = ratios.replace([-1, 1.5])
    assert other.parts == ratios.parts
    assert (other.ratios, other.history) == ((-1.0, 1.5), ())
    assert ratios.ratios == (0.25, 1.0)
    with pytest.raises(ValueError, match="2 parts need as many ratios, got 3"):
        ratios.replace([1, 2, 3])


def test_equal_by_parts_and_ratios():
    ratios = LayerRatios({"low": ["a", "b"], "high": ["c"]}, [0.25, 1])
    same = LayerRatios({"low": ["b", "a"], "high": ["c"]}, [0.25, 1], history=[{"step": 1}])
    assert ratios == same
    assert hash(ratios) == hash(same)
    assert ratios != ratios.replace([0.25, 0.5])
    assert ratios != LayerRatios({"low": ["a", "b"], "top": ["c"]}, [0.25, 1])
    assert ratios != LayerRatios({"high": ["c"], "low": ["a", "b"]}, [1, 0.25])
    assert ratios != dict(ratios)
    for copied in (pickle.loads(pickle.dumps(same)), copy.deepcopy(same)):
        assert (copied, copied.history, dict(copied.parts)) == (same, same.history, dict(same.parts))


@pytest.mark.parametrize(
    ("parts", "ratios", "kind", "sentence"),
    [
        ({}, [], ValueError, "ratios is empty"),
        ({"low": ["a"]}, [1, 2], ValueError, "1 parts need as many ratios, got 2"),
        ({"low": []}, [1], ValueError, "part 'low' holds no tensor; give it one or leave it out"),
        ({"low": ["a", "b"], "high": ["module.b"]}, [1, 2], ValueError, "'b' of part 'high' stands in part 'low' too"),
        ({"low": ["a", "a"]}, [1], ValueError, "'a' is named twice"),
        ({"low": ["a"]}, [math.inf], ValueError, "a ratio of 'low' must be finite, got inf"),
        ({"low": ["a"]}, ["1"], TypeError, "a ratio of 'low' must be a number, got '1'"),
        ({"low": "abc"}, [1], TypeError, "names must be an iterable of strings, got 'abc'"),
        ({"low": [1]}, [1], TypeError, "a tensor must be given by its name, got a int"),
        ({3: ["a"]}, [1], TypeError, "a part must be called by a string, got 3"),
    ],
)
def test_parts_that_are_none(parts, ratios, kind, sentence):
    with pytest.raises(kind, match=sentence):
        LayerRatios(parts, ratios)


def test_the_table():
    names = [*NAMES, "classifier.0.weight", "lm_head.a.weight", "lm_head.b.weight", *layers(7)[5:], "x"]
    ratios = LayerRatios.by_patterns(names, {".*mlp.*": 1 / 3, "model.*": -0.5, ".*": 1})
    assert str(ratios).splitlines() == [
        "part     holds                                                 tensors     ratio",
        ".*mlp.*  model.layers 0-1                                            2  0.333333",
        "model.*  model.layers 0-1+5-6, model.embed_tokens, model.norm        6      -0.5",
        ".*       classifier 0, lm_head, x                                    4         1",
    ]
    assert repr(ratios) == "<LayerRatios of 12 tensors: '.*mlp.*': 0.333333, 'model.*': -0.5, '.*': 1>"
    assert repr(LayerRatios.per_tensor(list("abcde"), 0.5).replace([1, 2, 3, 4, 5])).endswith("'c': 3 and 2 more>")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("name", ["r.yaml", "r.json", "r.JSON", "ratios"])
@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    labels=st.lists(TEXT, min_size=1, max_size=4, unique=True),
    ratios=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    name_of=TEXT,
    history=st.lists(st.dictionaries(TEXT, PLAIN, max_size=3), max_size=2),
)
def test_text_says_it_all(name, tmp_path_factory, labels, ratios, name_of, history):
    parts = {label: [f"{name_of}.{i}", f"{name_of} {i}"] for i, label in enumerate(labels)}
    saved = LayerRatios(parts, ratios[: len(parts)], history=history)
    path = tmp_path_factory.getbasetemp() / name
    saved.save(path)
    loaded = LayerRatios.load(path)
    assert loaded == saved
    assert dict(loaded.parts) == dict(saved.parts)
    assert [ratio.hex() for ratio in loaded.ratios] == [ratio.hex() for ratio in saved.ratios]
    assert loaded.history == saved.history


def test_both_forms_are_to_be_read(tmp_path):
    ratios = LayerRatios({"layers 0-1": ["a.weight", "b.weight"], "layer 2": ["c"]}, [0.2, 1e-7])
    ratios.save(tmp_path / "new" / "r.yaml")
    assert (tmp_path / "new" / "r.yaml").read_text() == (
        "parts:\n  layers 0-1:\n    ratio: 0.2\n    tensors:\n    - a.weight\n    - b.weight\n"
        "  layer 2:\n    ratio: 1.0e-07\n    tensors:\n    - c\n"
    )
    with_history = LayerRatios(ratios.parts, ratios.ratios, history=[{"ratios": (0.1, 0.2), "score": 1.5}])
    with_history.save(tmp_path / "r.json")
    parts = {"layers 0-1": {"ratio": 0.2, "tensors": ["a.weight", "b.weight"]}}
    parts |= {"layer 2": {"ratio": 1e-7, "tensors": ["c"]}}
    history = [{"ratios": [0.1, 0.2], "score": 1.5}]
    assert json.loads((tmp_path / "r.json").read_text()) == {"parts": parts, "history": history}
    with_history.save(tmp_path / "r.yaml")
    assert LayerRatios.load(tmp_path / "r.yaml").history == tuple(history)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "r.json", "r.yaml", "r.yaml"]


def test_numbers_as_people_write_them(tmp_path):
    parts = "a: {ratio: 1e-3, tensors: [x]}, b: {ratio: -2, tensors: [y]}, c: {ratio: .5, tensors: [z]}"
    (tmp_path / "r.yaml").write_text(f"parts: {{{parts}}}")
    assert LayerRatios.load(tmp_path / "r.yaml").ratios == (1e-3, -2.0, 0.5)


PART = '{"ratio": 0.5, "tensors": ["x"]}'
NO_PARTS = "is not a mapping of parts, and history if there is any; correct it"
NO_PART = "gives part 'a' not just a ratio and a list of tensors; correct it"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("r.json", "{", "is not JSON .*; correct it"),
        ("r.json", "parts:", "is not JSON .*; correct it"),
        ("r.yaml", "parts: [", "is not YAML .*; correct it"),
        ("r.yaml", b"\xff\xfe\x00", "is not YAML .*; correct it"),
        ("r.yaml", "[" * 2000, "is not YAML .*; correct it"),
        ("r.yaml", "", NO_PARTS),
        ("r.yaml", "- 1", NO_PARTS),
        ("r.json", "{}", NO_PARTS),
        ("r.json", f'{{"low": {PART}}}', NO_PARTS),
        ("r.json", '{"parts": {}}', "has no mapping from parts to their ratio and tensors under 'parts'"),
        ("r.json", '{"parts": [1]}', "has no mapping from parts"),
        ("r.yaml", "parts: {a: 0.5}", NO_PART),
        ("r.yaml", "parts: {a: {ratio: 0.5}}", NO_PART),
        ("r.yaml", "parts: {a: {ratio: 1, tensors: x}}", NO_PART),
        ("r.yaml", "parts: {a: {ratio: 1, tensors: [x], k: 1}}", NO_PART),
        ("r.yaml", "parts: {a: {ratio: 1, tensors: []}}", ": part 'a' holds no tensor"),
        ("r.yaml", "parts: {a: {ratio: 1, tensors: [1]}}", ": a tensor must be given by its name, got a int"),
        ("r.yaml", "parts: {a: {ratio: x, tensors: [x]}}", ": a ratio of 'a' must be a number, got 'x'"),
        ("r.yaml", "parts: {a: {ratio: '0.5', tensors: [x]}}", ": a ratio of 'a' must be a number, got '0.5'"),
        ("r.json", '{"parts": {"a": {"ratio": NaN, "tensors": ["x"]}}}', "is not JSON"),
        ("r.yaml", "parts: {a: {ratio: .inf, tensors: [x]}}", ": a ratio of 'a' must be finite, got inf"),
        ("r.yaml", "parts: {a: {ratio: yes, tensors: [x]}}", ": a ratio of 'a' must be a number, got True"),
        ("r.yaml", f"parts: {{a: {{ratio: 1{'0' * 400}, tensors: [x]}}}}", ": int too large to convert to float"),
        ("r.yaml", "parts: {a: !!map [1, 2]}", "is not YAML .*expected a mapping node"),
        ("r.yaml", "parts: {1: {ratio: 1, tensors: [x]}}", ": a part must be called by a string, got 1"),
        ("r.yaml", "parts: {a: {ratio: 1, tensors: [x, x]}}", ": 'x' is named twice"),
        ("r.yaml", f"parts: {{a: {PART}, b: {PART}}}", ": 'x' of part 'b' stands in part 'a' too; choose one"),
        ("r.json", f'{{"parts": {{"a": {PART}, "a": {PART}}}}}', r"is not JSON \('a' stands in it twice\)"),
        ("r.yaml", f"parts:\n  a: {PART}\n  a: {PART}", r"is not YAML \('a' stands in it twice\)"),
        ("r.yaml", f"parts: {{a: {PART}}}\nhistory: {{}}", "has a history that is no list of mappings"),
        ("r.yaml", f"parts: {{a: {PART}}}\nhistory: [1]", "has a history that is no list of mappings"),
    ],
)
def test_files_that_say_something_else(name, text, sentence, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=sentence) as raised:
        LayerRatios.load(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_or_written(tmp_path, monkeypatch):
    ratios = LayerRatios({"a": ["x"]}, [0.5])
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist; give a file that LayerRatios\.save wrote"):
        LayerRatios.load(tmp_path / "gone.yaml")
    with pytest.raises(OSError, match=r"cannot write .*: Is a directory; nothing of it is left"):
        ratios.save(tmp_path)
    with pytest.raises(TypeError, match=r"the history cannot be written to .*r\.json: .*; record plain data"):
        LayerRatios(ratios.parts, [0.5], history=[{"model": object()}]).save(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []

    ratios.save(tmp_path / "r.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    for attempt, name in ((ratios.save, "s"), (LayerRatios.load, "r")):
        message = rf"{name}\.yaml needs PyYAML: pip .*'fused_merge\[cli\]', or take a \.json"
        with pytest.raises(ImportError, match=message):
            attempt(tmp_path / f"{name}.yaml")
    ratios.save(tmp_path / "r.json")
    assert LayerRatios.load(tmp_path / "r.json") == ratios


def test_a_full_disk_leaves_what_was_there(tmp_path, request):
    path = tmp_path / "r.json"
    LayerRatios({"a": ["x"]}, [0.5]).save(path)
    request.getfixturevalue("_small_files")
    with pytest.raises(OSError, match=r"cannot write .*r\.json: File too large; nothing of it is left"):
        LayerRatios({"a": layers(2000)}, [0.5]).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert dict(LayerRatios.load(path)) == {"x": 0.5}


def test_a_setting_is_looked_up_by_name():
    ratios = LayerRatios({".*": ["a"], "rest": ["b", "c.*"]}, [0.1, 0.2])
    assert per_tensor(ratios, ["c.*", "a"], what="ratio") == {"c.*": 0.2, "a": 0.1}
    assert per_tensor(ratios, [], what="ratio") == {}
    message = r"LayerRatios given as weight lack 'c\.x', 'd'; make them from what is merged"
    with pytest.raises(ValueError, match=message):
        per_tensor(ratios, ["a", "c.x", "d"], what="weight")


@pytest.fixture
def ends(tmp_path):
    return tuple(save(llama(seed, dtype=torch.bfloat16), tmp_path / f"model{seed}") for seed in range(2))


def test_checkpoints_have_each_tensor_at_its_own_ratio(ends, tmp_path):
    thirds = LayerRatios.by_parts(ends[0], [0.2, 0.9])
    more = LayerRatios({**thirds.parts, "not stored": ["lm_head.weight"]}, [0.2, 0.9, 0.5])
    made = interpolate_checkpoints(*ends, [0.5, thirds], tmp_path / "out")
    assert made[0].name == "r0.50"
    assert re.fullmatch(rf"r{math.fsum(thirds.values()) / len(thirds):.2f}-[0-9a-f]{{6}}", made[1].name)
    base, tuned, written = (load_file(folder / "model.safetensors") for folder in (*ends, made[1]))
    assert written.keys() == base.keys()
    for name, tensor in written.items():
        expected = torch.empty_like(tensor)
        functional.interpolate([base[name]], [tuned[name]], [thirds[name]], [[expected]])
        assert same_bits(tensor, expected), name
    assert {thirds[name] for name in written} == {0.2, 0.9}
    assert json.loads((made[1] / "fused_merge.json").read_text())["recipe"]["ratio"] == dict(thirds)

    (again,) = interpolate_checkpoints(*ends, {"thirds": more}, tmp_path / "out")
    assert again.name == "thirds"
    assert (again / "model.safetensors").read_bytes() == (made[1] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"the LayerRatios given as ratio lack 'model\.norm\.weight'; make them from"):
        interpolate_checkpoints(*ends, [LayerRatios.per_tensor(set(base) - {"model.norm.weight"}, 1)], tmp_path / "x")


def test_weights_of_a_merge(ends, tmp_path):
    weights = LayerRatios.by_kind(ends[0], {"attention": 0.25, "other": 0.75})
    for out, setting in (("kinds", weights), ("patterns", {".*attn.*": 0.25, ".*": 0.75})):
        merge_checkpoints(None, {ends[0]: 1.0, ends[1]: setting}, "linear", tmp_path / out)
    kinds, patterns = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("kinds", "patterns"))
    assert kinds == patterns
