"""The names and the packing that a model has in memory, of files that have others, through all that reads both."""

from __future__ import annotations

import pytest
from bits import assert_same_bits
from families import FAMILIES, family_model, load_family, logits
from folders import load
from safetensors.torch import save_file
from transformers import conversion_mapping
from transformers.core_model_loading import Concatenate, Interleave, Transpose, WeightConverter

import fused_merge as fm
from fused_merge.io.layouts import in_memory, layout_of
from fused_merge.io.sources import FileSource, open_source

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Family -> two models, their folders, and their folders in the layout that they have in memory."""
    made = {}
    for family in FAMILIES:
        models = [family_model(family, seed) for seed in (0, 1)]
        folders, packed = [], []
        for i, model in enumerate(models):
            folders.append(tmp_path_factory.mktemp(family) / f"{i}")
            model.save_pretrained(folders[-1], max_shard_size="20KB")
            packed.append(tmp_path_factory.mktemp(family) / f"{i}")
            model.save_pretrained(packed[-1], save_original_format=False)
        made[family] = models, folders, packed
    return made


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@every_family
def test_a_file_as_the_model_has_it(family, pairs):
    (model, _), (folder, _), (packed, _) = pairs[family]
    for path in (folder, packed):
        source = open_source(path)
        view = in_memory(source, layout_of(source))
        assert_same_bits({name: view[name] for name in view}, {name: model.state_dict()[name] for name in view})
        assert [name for name in view if name not in view.buffers] == [*parameters(model)]
        assert view.ordered
        for name in filter(view.shape, view):
            rows = slice(view.shape(name)[0] // 2, None)
            assert_same_bits(view.box(name, (rows,)), view[name][rows])
            assert_same_bits(view.head(name, 7), view[name].flatten()[:7])


def test_an_expert_is_read_from_its_own_file(pairs, monkeypatch):
    _, (folder, _), _ = pairs["qwen3-moe"]
    source = open_source(folder)
    view = in_memory(source, layout_of(source))
    read = []
    monkeypatch.setattr(
        FileSource, "box", lambda self, name, box, own=FileSource.box: read.append((name, box)) or own(self, name, box)
    )
    view.box("model.layers.1.mlp.experts.gate_up_proj", (slice(2, 3), slice(8, 12)))
    assert read == [("model.layers.1.mlp.experts.2.up_proj.weight", (slice(0, 4), slice(0, 16)))]


@every_family
def test_a_delta_of_files_is_that_of_the_models(family, pairs, tmp_path):
    models, folders, packed = pairs[family]
    whole = fm.ReferenceDelta.from_models(*models)
    for ends in (folders, packed, (folders[0], packed[1])):
        delta = fm.ReferenceDelta.from_checkpoints(*ends)
        assert (delta.names, delta.identity, delta.ordered) == (whole.names, whole.identity, True)
        assert_same_bits({name: delta.tensor(name) for name in delta.names}, {n: whole.tensor(n) for n in whole.names})
    mixed = fm.ReferenceDelta.from_models(folders[0], models[1])
    assert (mixed.names, mixed.identity) == (whole.names, whole.identity)
    saved = delta.save(tmp_path / "delta.safetensors", reserve_rate=0.5, method="magnitude")
    for given in (models[1].named_parameters(), models[1].parameters()):
        fm.OnTIESAdamW(given, reference_delta=saved, lr=1e-3, reserve_rate=0.5).bind()


@every_family
def test_a_model_is_moved_between_its_files(family, pairs):
    models, folders, packed = pairs[family]
    moved = family_model(family, 2)
    before = {name: tensor.clone() for name, tensor in moved.state_dict().items()}
    sweep = fm.RatioSweep(moved, folders[0], packed[1])
    for ratio, model in ((0.0, models[0]), (1.0, models[1])):
        with sweep.at(ratio):
            assert_same_bits(moved.state_dict(), model.state_dict())
            assert_same_bits(logits(moved), logits(model))
    with sweep.at(0.3):
        for name, parameter in parameters(moved).items():
            ends = (dict(model.named_parameters())[name].detach() for model in models)
            assert_same_bits(parameter, fm.interpolate(*ends, [0.3])[0])
    assert_same_bits(moved.state_dict(), before)


@every_family
def test_a_path_between_files_of_either_layout(family, pairs, tmp_path):
    models, folders, packed = pairs[family]
    for i, ends in enumerate((folders, (folders[0], packed[1]), (packed[0], folders[1]))):
        out = tmp_path / str(i)
        written = fm.interpolate_checkpoints(*ends, [0.0, 0.4, 1.0], out, progress=False)
        assert load(written[1]).keys() == load(ends[0]).keys()
        for folder, model in ((written[0], models[0]), (written[2], models[1])):
            loaded = load_family(family, folder)
            assert_same_bits(loaded.state_dict(), model.state_dict())
            assert_same_bits(logits(loaded), logits(model))
        halfway = parameters(load_family(family, written[1]))
        expected = fm.interpolate(*map(parameters, models), [0.4])[0]
        assert_same_bits(halfway, expected)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("qwen3-moe", "model.")])
def test_files_of_the_hub_that_lack_the_prefix_of_their_model(family, prefix, pairs, tmp_path):
    models, folders, _ = pairs[family]
    short = []
    for folder in folders:
        short.append(tmp_path / folder.name)
        short[-1].mkdir()
        (short[-1] / "config.json").write_bytes((folder / "config.json").read_bytes())
        stripped = {name.removeprefix(prefix): tensor for name, tensor in load(folder).items()}
        save_file(stripped, short[-1] / "model.safetensors", {"format": "pt"})
    delta = fm.ReferenceDelta.from_checkpoints(*short)
    assert delta.identity == fm.ReferenceDelta.from_models(*models).identity
    with fm.RatioSweep(family_model(family, 2), short[0], folders[1]).at(1.0) as model:
        assert_same_bits(model.state_dict(), models[1].state_dict())
    (end,) = fm.interpolate_checkpoints(short[0], folders[1], [1.0], tmp_path / "line", progress=False)
    assert_same_bits(load_family(family, end).state_dict(), models[1].state_dict())
    assert load(end).keys() == load(short[0]).keys()


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "task_arithmetic"])
def test_models_in_either_layout_are_merged_alike(method, pairs, tmp_path):
    """Of a trim, too, which looks at the whole of a packed tensor."""
    _, (base, tuned), (packed_base, packed_tuned) = pairs["qwen3-moe"]
    options = {"progress": False} | ({} if method in ("linear", "task_arithmetic") else {"density": 0.4})
    for first, same, other in ((base, tuned, packed_tuned), (packed_base, packed_tuned, tuned)):
        models = [{first: 0.2, model: 0.7} if method == "linear" else {model: 0.7} for model in (same, other)]
        merged = [
            fm.merge_checkpoints(
                None if method == "linear" else first, each, method, tmp_path / f"{first.parent.name}{i}", **options
            )
            for i, each in enumerate(models)
        ]
        assert_same_bits(*(load(folder) for folder in merged))


def test_a_method_that_needs_whole_tensors_refuses_pieces(pairs, tmp_path):
    _, (_, tuned), (packed_base, _) = pairs["qwen3-moe"]
    message = (
        "'slerp' looks at whole tensors or rows, and what belongs to 'model.layers.0.mlp.experts.down_proj' lies in"
    )
    with pytest.raises(ValueError, match=message):
        fm.merge_checkpoints(packed_base, {tuned: 0.5}, "slerp", tmp_path / "out")


TURNED = {"names": ["turned"], "operations": [Transpose(0, 1)], "stored": lambda x: [x.T.contiguous()]}
SPLIT = {
    "names": ["left", "right"],
    "operations": [Concatenate(dim=1)],
    "stored": lambda x: [part.contiguous() for part in x.chunk(2, dim=1)],
}


WOVEN = {
    "names": ["woven"],
    "operations": [Interleave(dim=0)],
    "stored": lambda x: [x.view(2, -1, x.shape[1]).transpose(0, 1).reshape(x.shape).contiguous()],
}


@pytest.mark.parametrize("kind", [TURNED, SPLIT, WOVEN], ids=["transposed", "split along columns", "interleaved"])
def test_a_layout_of_other_orders_of_elements_is_refused_with_a_way_out(kind, pairs, tmp_path, monkeypatch):
    (model, _), (base, _), _ = pairs["llama"]
    sources = [f"mlp.{name}.weight" for name in kind["names"]]
    converter = WeightConverter(sources, "mlp.up_proj.weight", operations=kind["operations"])
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [converter])
    other, tensors = tmp_path / "other", {}
    other.mkdir()
    (other / "config.json").write_bytes((base / "config.json").read_bytes())
    for name, x in load(base).items():
        parts = kind["stored"](x) if "up_proj" in name else [x]
        names = [name.replace("up_proj", part) for part in kind["names"]] if "up_proj" in name else [name]
        tensors |= dict(zip(names, parts, strict=True))
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for ends in ((base, other), (other, base)):
        with pytest.raises(
            ValueError, match=r"one architecture in two layouts, with .* and .*, of other orders of elem"
        ):
            fm.interpolate_checkpoints(*ends, [0.5], tmp_path / "line")
        delta = fm.ReferenceDelta.from_checkpoints(*ends)
        assert delta.names == tuple(parameters(model))
        assert all(not delta.tensor(name).any() for name in delta.names)
        with fm.RatioSweep(family_model("llama", 2), *ends).at(1.0) as moved:
            assert_same_bits(moved.state_dict(), model.state_dict())


def test_ratios_by_the_names_of_either_side(pairs, tmp_path):
    """Found for a model in memory, or written for its files: the same path."""
    models, (base, tuned), _ = pairs["qwen3-moe"]
    in_memory_names, on_disk = (fm.LayerRatios.by_parts(each, [0.2, 0.7]) for each in (models[0], base))
    folders = fm.interpolate_checkpoints(base, tuned, {"a": in_memory_names, "b": on_disk}, tmp_path, progress=False)
    assert_same_bits(*(load(folder) for folder in folders))
    sweep = fm.RatioSweep(family_model("qwen3-moe", 2), base, tuned)
    with sweep.at(in_memory_names):
        by_memory = {name: x.clone() for name, x in sweep.model.state_dict().items()}
        sweep.move_to(on_disk)
        assert_same_bits(sweep.model.state_dict(), by_memory)
        message = (
            "'model.layers.0.mlp.experts.gate_up_proj' is one tensor here, and what it packs has more than one ratio"
        )
        with pytest.raises(ValueError, match=message):
            sweep.move_to({r".*experts\.2\..*": 0.5, ".*": 0.1})
