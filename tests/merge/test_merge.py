"""Finished models merged from disk to disk: the bits of the eager code on whole tensors, whatever the blocks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from tiny import equal_bits, llama, save
from transformers import LlamaForCausalLM

from fused_merge.checkpoints import engine, interpolate_checkpoints, verify_checkpoint
from fused_merge.cli import main
from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.eager.merge import MERGE_METHODS, trim_threshold
from fused_merge.eager.merge import merge as eager_merge
from fused_merge.merge import merge, merge_checkpoints, plan_merge, plan_mergekit, whole_tensors
from fused_merge.merge.mergekit import read_mergekit

DATA = Path(__file__).parent / "mergekit"
NAMES = ["base", "a", "b", "c"]
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (61, 83),
    "model.layers.1.mlp.up_proj.weight": (1025,),
    "model.norm.weight": (7,),
    "scalar": (),
    "none": (0, 4),
}
UP0, UP1, NORM, SCALAR, NONE = SHAPES
FILLED = {name: shape for name, shape in SHAPES.items() if name != NONE}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Wait for no disk: that files are on it is another test's."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small_blocks(monkeypatch):
    """Let small tensors cross every boundary that large ones cross."""
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 4096)
    monkeypatch.setattr(merge, "_PIECE", 301)
    monkeypatch.setattr(whole_tensors, "_BLOCK", 64)


def tensors_of(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(99)
    floating = {
        name: (torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }
    return {**floating, "count": torch.arange(5) + seed}


def write(folder, *files):
    """Write a model folder; the tensors of each mapping get a file to themselves."""
    folder.mkdir(parents=True)
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors")
        return folder
    weight_map = {}
    for i, tensors in enumerate(files):
        save_file(tensors, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def split(tensors, *first):
    """The tensors of two files: those that are named, and the others."""
    return {name: tensors[name] for name in first}, {name: x for name, x in tensors.items() if name not in first}


@pytest.fixture
def models(tmp_path):
    """Write models of given dtypes: each in files of its own kind and order."""

    def models(*dtypes, shapes=SHAPES):
        tensors = [tensors_of(i, dtype, shapes) for i, dtype in enumerate(dtypes)]
        folders = []
        for i, (name, own) in enumerate(zip(NAMES, tensors, strict=False)):
            first, *rest = own
            files = [(own,), split(own, *rest[::-1]), split(own, first), (dict(reversed(own.items())),)][i]
            folders.append(write(tmp_path / name, *files))
        return folders, tensors

    return models


def load(folder):
    return {name: x for file in sorted(Path(folder).glob("*.safetensors")) for name, x in load_file(file).items()}


def recipe_of(folder):
    return json.loads((folder / "fused_merge.json").read_text())["recipe"]


def everything_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- the eager code, streamed

# method: weights of the models, and options; densities are as `eager.merge.merge` takes them.
ROWS = {
    "linear": ("linear", [0.7, -0.4, 1.3], {}),
    "linear, one model": ("linear", [0.7], {}),
    "linear, a sum": ("linear", [0.7, -0.4, 1.3], {"normalize": False}),
    "slerp": ("slerp", [0.3], {}),
    "slerp, beyond": ("slerp", [1.7], {}),
    "task arithmetic": ("task_arithmetic", [0.7, -0.4, 1.3], {"scale": 0.8}),
    "task arithmetic, one model, a mean": ("task_arithmetic", [0.7], {"normalize": True}),
    "ties": ("ties", [0.7, 0.4, 1.3], {"densities": [0.3, 0.55, 1.0]}),
    "ties of everything": ("ties", [0.7, 0.4], {}),
    "ties, a sum": ("ties", [0.7, -0.4, 1.3], {"densities": [0.2, 0.2, 0.2], "normalize": False, "scale": 1.5}),
    "dare": ("dare_linear", [0.7, -0.4, 1.3], {"densities": [0.3, 0.55, 1.0], "seed": 11}),
    "dare, not rescaled": ("dare_linear", [0.7, 0.4], {"densities": [0.5, 0.5], "rescale": False}),
    "dare ties": ("dare_ties", [0.7, -0.4, 1.3], {"densities": [0.3, 0.55, 0.9], "seed": 2**63 + 5}),
    "dare ties, a mean": ("dare_ties", [0.7, 0.4], {"densities": [0.3, 0.9], "normalize": True, "scale": 0.5}),
}
MIXES = {
    "fp32": ([torch.float32] * 4, None),
    "bf16": ([torch.bfloat16] * 4, None),
    "fp16": ([torch.float16] * 4, None),
    "fp64": ([torch.float64] * 4, None),
    "bf16 to fp32": ([torch.bfloat16] * 4, torch.float32),
    "all": ([torch.float32, torch.bfloat16, torch.float64, torch.float16], torch.bfloat16),
    "halves": ([torch.bfloat16, torch.float16, torch.bfloat16, torch.float32], torch.float16),
}


def test_there_is_a_row_of_every_method():
    assert {method for method, _, _ in ROWS.values()} == set(MERGE_METHODS)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("row", ROWS)
def test_streams_have_the_bits_of_whole_tensors(row, mix, models, tmp_path, small_blocks):
    method, weights, options = ROWS[row]
    dtypes, dtype = MIXES[mix]
    has_base = MERGE_METHODS[method].has_base
    folders, tensors = models(*dtypes[: len(weights) + has_base])
    base = folders[0] if has_base else None
    asked = {key: value for key, value in options.items() if key != "densities"}
    out = merge_checkpoints(
        base,
        dict(zip(folders[has_base:], weights, strict=True)),
        method,
        tmp_path / "out",
        density=options.get("densities"),
        dtype=dtype,
        threads=3,
        **asked,
    )
    made = load(out)
    assert made.keys() == {*SHAPES, "count"}
    for name in SHAPES:
        want = eager_merge(
            tensors[0][name] if has_base else None,
            [own[name] for own in tensors[has_base:]],
            weights,
            method=method,
            name=name,
            dtype=dtype,
            **options,
        )
        assert equal_bits(made[name], want), name
    assert torch.equal(made["count"], tensors[0]["count"])


# --- the papers once more, in numpy


def in_numpy(tensors):
    return [{name: x.float().numpy() for name, x in own.items() if x.is_floating_point()} for own in tensors]


def ties(base, thetas, weights, keeps):
    """Yadav et al. 2023, section 3, an element at a time: trim, elect a sign, average what has it."""
    deltas = np.stack(
        [np.where(keep, theta - base, np.float32(0)) for theta, keep in zip(thetas, keeps, strict=True)], -1
    )
    merged = np.zeros_like(base)
    for place in np.ndindex(base.shape):
        terms = [np.float32(w) * d for w, d in zip(weights, deltas[place], strict=True)]
        sign = 1 if sum(terms) >= 0 else -1
        chosen = [(t, np.float32(w)) for t, w in zip(terms, weights, strict=True) if t * sign > 0]
        if chosen:
            mass = sum(w for _, w in chosen)
            merged[place] = np.float32(sum(t for t, _ in chosen)) / np.float32(mass if mass != 0 else 1)
    return base + merged


@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_ties_by_numpy(trim, models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.float32] * 3)
    base, *thetas = in_numpy(tensors)
    # The deltas of one tensor are larger: its share of those of the whole model is, too.
    thetas = [own | {UP1: base[UP1] + 4 * (own[UP1] - base[UP1])} for own in thetas]
    for folder, own in zip(folders[1:], thetas, strict=True):
        for file in folder.glob("*.safetensors"):
            save_file({name: torch.tensor(own.get(name, x.numpy())) for name, x in load_file(file).items()}, file)
    weights, density = [0.7, 0.4], 0.2
    out = merge_checkpoints(
        folders[0], dict(zip(folders[1:], weights, strict=True)), "ties", tmp_path / "out", density=density, trim=trim
    )
    made = load(out)
    deltas = [{name: own[name] - base[name] for name in SHAPES} for own in thetas]
    joined = [np.concatenate([delta.ravel() for delta in own.values()]) for own in deltas]
    levels = [np.sort(np.abs(delta))[-int(density * delta.size)] for delta in joined]
    shares = []
    for name in SHAPES:
        if trim == "tensor":
            keeps = [reference.top(own[name], density) if own[name].size else own[name] for own in deltas]
        else:
            keeps = [np.abs(own[name]) >= level for own, level in zip(deltas, levels, strict=True)]
        shares.append(float(np.mean(keeps)) if keeps[0].size else 0.0)
        np.testing.assert_array_equal(
            made[name].numpy(), ties(base[name], [own[name] for own in thetas], weights, keeps)
        )
    assert (shares[1] > 2 * shares[0]) == (trim == "model")


def test_a_trim_over_the_whole_model_of_fp64(models, tmp_path, small_blocks):
    folders, tensors = models(torch.float64, torch.float64)
    out = merge_checkpoints(folders[0], {folders[1]: 1}, "ties", tmp_path / "out", density=0.1, trim="model", threads=3)
    delta = np.concatenate([(tensors[1][name] - tensors[0][name]).numpy().ravel() for name in SHAPES])
    level = np.sort(np.abs(delta))[-int(0.1 * delta.size)]
    for name, got in load(out).items():
        if name in SHAPES:
            base = tensors[0][name].numpy()
            own = tensors[1][name].numpy() - base
            np.testing.assert_array_equal(got.numpy(), base + np.where(np.abs(own) >= level, own, 0))


def test_one_model_of_fp64_makes_every_trim_one_of_fp64(models, tmp_path, small_blocks):
    folders, tensors = models(torch.float32, torch.bfloat16, torch.float64)
    weights = [0.5, 0.25]
    out = merge_checkpoints(
        folders[0],
        dict(zip(folders[1:], weights, strict=True)),
        "ties",
        tmp_path / "out",
        density=0.3,
        trim="model",
        dtype="float64",
    )
    base, *thetas = [{name: x.double() for name, x in own.items()} for own in tensors]
    levels = [trim_threshold(torch.cat([(own[n] - base[n]).flatten() for n in SHAPES]), 0.3) for own in thetas]
    for name in SHAPES:
        own = [theta[name] for theta in thetas]
        want = eager_merge(base[name], own, weights, method="ties", name=name, thresholds=levels)
        assert equal_bits(load(out)[name], want)


def test_a_trim_over_a_model_in_several_files(models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.float32] * 3)
    options = {"density": [0.3, 1.0], "trim": "model"}
    arguments = {folders[0]: 0.5, folders[2]: 0.25}, "ties"
    whole = merge_checkpoints(folders[1], *arguments, tmp_path / "whole", **options)
    assert len([*whole.glob("*.safetensors")]) == 2
    delta = torch.cat([(tensors[0][name] - tensors[1][name]).flatten() for name in SHAPES])
    level = trim_threshold(delta, 0.3)
    for name in SHAPES:
        thetas = [tensors[0][name], tensors[2][name]]
        want = eager_merge(tensors[1][name], thetas, [0.5, 0.25], method="ties", name=name, thresholds=[level, 0])
        assert equal_bits(load(whole)[name], want)


@pytest.mark.parametrize("rescale", [None, False])
def test_dare_by_numpy(rescale, models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.bfloat16] * 3)
    base, *thetas = in_numpy(tensors)
    weights, densities = [0.7, -0.4], [0.3, 0.6]
    out = merge_checkpoints(
        folders[0],
        dict(zip(folders[1:], weights, strict=True)),
        "dare_linear",
        tmp_path / "out",
        density=densities,
        rescale=rescale,
        seed=7,
        threads=3,
    )
    made = load(out)
    for name, shape in SHAPES.items():
        delta = np.zeros(shape, np.float32)
        for i, (theta, w, p) in enumerate(zip(thetas, weights, densities, strict=True)):
            kept = reference.keep(int(np.prod(shape)), p, 7, i, name, 1).reshape(shape)
            divisor = np.float32(1 if rescale is False else p)
            term = np.float32(w) * (np.where(kept, theta[name] - base[name], np.float32(0)) / divisor)
            delta = term if i == 0 else delta + term
        assert equal_bits(made[name], torch.as_tensor(base[name] + delta).bfloat16())


def test_the_first_mask_is_that_of_a_reference_delta(models, tmp_path):
    folders, tensors = models(torch.float32, torch.float32)
    out = merge_checkpoints(folders[0], {folders[1]: 1}, "dare_linear", tmp_path / "out", density=0.25, seed=3)
    path = ReferenceDelta.from_checkpoints(*folders).save(tmp_path / "tau.safetensors", 0.25, "random", 3)
    delta = ReferenceDelta.load(path)
    for name in (UP0, UP1):
        moved = load(out)[name] != tensors[0][name]
        assert torch.equal(moved, delta.sparse(name, delta.sparsity).unpack() != 0)


# --- nothing shows how it was done


SPELLINGS = {
    "one thread": {"threads": 1},
    "many threads": {"threads": 5},
    "little memory": {"threads": 2, "max_memory": 4_300_000},
    "small files": {"max_shard_size": 3000},
    "one file": {"max_shard_size": "1GB"},
    "verified": {"verify": True},
}


@pytest.mark.parametrize("row", ["ties", "slerp", "dare ties"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_threads_memory_and_sharding_do_not_show(spelling, row, models, tmp_path, monkeypatch):
    method, weights, options = ROWS[row]
    folders, _ = models(*[torch.bfloat16] * (len(weights) + 1), shapes=FILLED)
    density = options.get("densities")
    seed = options.get("seed", 0)
    arguments = folders[0], dict(zip(folders[1:], weights, strict=True)), method
    plain = load(merge_checkpoints(*arguments, tmp_path / "plain", density=density, seed=seed))
    for module, name, size in ((engine, "_LARGEST_BLOCK", 4096), (merge, "_PIECE", 77), (whole_tensors, "_BLOCK", 16)):
        monkeypatch.setattr(module, name, size)
    other = load(merge_checkpoints(*arguments, tmp_path / "other", density=density, seed=seed, **SPELLINGS[spelling]))
    assert other.keys() == plain.keys()
    assert all(equal_bits(other[name], plain[name]) for name in plain)


def test_the_order_and_the_files_of_the_models_do_not_show(tmp_path):
    tensors = [tensors_of(i) for i in range(2)]
    made = []
    for i, files in enumerate([lambda x: (x,), lambda x: split(x, UP1, "count"), lambda x: split(x, NORM, UP0)]):
        base, model = (write(tmp_path / f"{name}{i}", *files(x)) for name, x in zip(NAMES, tensors, strict=False))
        made.append(load(merge_checkpoints(base, {model: 0.5}, "dare_ties", tmp_path / f"out{i}", density=0.5)))
    assert all(equal_bits(made[0][name], other[name]) for other in made[1:] for name in made[0])


def test_a_merge_made_twice_is_the_same(models, tmp_path):
    folders, _ = models(*[torch.bfloat16] * 3)
    arguments = folders[0], {folders[1]: 0.5, folders[2]: 0.3}, "ties"
    first = everything_in(merge_checkpoints(*arguments, tmp_path / "out", density=0.5))
    # Of the same name: it stands in the card.
    again = merge_checkpoints(*arguments, tmp_path / "again" / "out", density=0.5)
    assert everything_in(again) == first
    assert merge_checkpoints(*arguments, tmp_path / "out", density=0.5) == tmp_path / "out"
    assert everything_in(tmp_path / "out") == first


def test_bytes_are_read_once_and_as_often_as_a_trim_says(models, tmp_path, monkeypatch):
    folders, tensors = models(*[torch.float32] * 3)
    reads = []
    read = engine.read_into

    def counted(handle, path, view, at):
        reads.append((path, at, len(view)))
        read(handle, path, view, at)

    monkeypatch.setattr(engine, "read_into", counted)
    monkeypatch.setattr(whole_tensors, "read_into", counted)
    floats = sum(x.nbytes for x in tensors[0].values() if x.is_floating_point())
    size = sum(x.nbytes for x in tensors[0].values())
    both = {folders[1]: 1, folders[2]: 1}
    # What the stream reads, and what is read before it.
    for method, chosen, options, before in (
        ("task_arithmetic", both, {}, 0),
        ("dare_ties", both, {"density": 0.5}, 0),
        ("ties", both, {}, 0),
        ("ties", both, {"density": [0.5, 1.0]}, 2 * 2 * floats),
        ("ties", both, {"density": 0.5, "trim": "model"}, 2 * 2 * 2 * floats),
        ("slerp", {folders[1]: 0.5}, {}, 2 * floats),
    ):
        reads.clear()
        job = plan_merge(folders[0], chosen, method, tmp_path / "out", overwrite=True, **options)
        assert job.bytes_read == (1 + len(chosen)) * size
        assert (job.whole_tensor_pass.bytes_read(job.files, job.files) if job.whole_tensor_pass else 0) == before
        job.run(progress=False)
        assert sum(nbytes for _, _, nbytes in reads) == before + job.bytes_read


# --- mergekit's files


def ordered(tensor):
    """Bit patterns as integers in the order of the values: neighbours are one ulp apart."""
    pattern = tensor.bfloat16().view(torch.int16).long()
    return torch.where(pattern >= 0, pattern, torch.iinfo(torch.int16).min - pattern)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fused-merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize("case", sorted(path.stem for path in DATA.glob("*.yaml")))
def test_files_of_mergekit_run_unchanged(case, tmp_path, monkeypatch, run, small_blocks):
    monkeypatch.chdir(DATA)
    (out,) = plan_mergekit(f"{case}.yaml", tmp_path / "library" / "out").run(progress=False)
    assert run("merge", f"{case}.yaml", tmp_path / "command" / "out") == (0, f"{tmp_path}/command/out\n", "")
    assert everything_in(tmp_path / "command" / "out") == everything_in(out)

    made, theirs = load(out), load_file(DATA / "expected" / f"{case}.safetensors")
    assert made.keys() == theirs.keys()
    recipe = read_mergekit(f"{case}.yaml")
    for name, want in theirs.items():
        assert made[name].dtype == want.dtype
        assert (ordered(made[name]) - ordered(want)).abs().max() <= 1, name
        if MERGE_METHODS[recipe.method].deltas:
            assert torch.equal(made[name], want), name
    own = json.loads((out / "config.json").read_text())
    written = "bfloat16" if recipe.dtype == torch.bfloat16 else "float32"
    assert own == {**json.loads((DATA / recipe.files_from / "config.json").read_text()), "torch_dtype": written}
    LlamaForCausalLM.from_pretrained(out)


def test_the_recipe_of_a_file_is_its_text(tmp_path, monkeypatch):
    monkeypatch.chdir(DATA)
    (out,) = plan_mergekit("ties.yaml", tmp_path / "out", max_shard_size=3000).run(progress=False)
    recipe = recipe_of(out)
    assert recipe["mergekit"] == Path("ties.yaml").read_text()
    assert [Path(model["path"]).name for model in recipe["models"]] == ["a", "b"]
    assert all(model.keys() == {"path", "bytes"} for model in recipe["models"])
    (tmp_path / "again.yaml").write_text(recipe["mergekit"])
    again = plan_mergekit(tmp_path / "again.yaml", tmp_path / "out", max_shard_size=recipe["max_shard_size"])
    assert again.identity == json.loads((out / "fused_merge.json").read_text())["plan"]
    # It is there already.
    assert again.run() == [tmp_path / "out"]
    with pytest.raises(FileExistsError, match="out exists; pass overwrite=True"):
        plan_mergekit("ties.yaml", tmp_path / "out")
    plan_mergekit(read_mergekit("ties.yaml"), tmp_path / "out", overwrite=True).run()
    assert not (out / "model.safetensors.index.json").exists()


# --- what is written


def test_folders_that_transformers_loads(tmp_path):
    originals = [llama(i, dtype=torch.bfloat16) for i in range(3)]
    originals[1].generation_config.temperature = 0.25
    originals[1].generation_config.do_sample = True
    folders = [save(model, tmp_path / name, "3KB") for name, model in zip(NAMES, originals, strict=False)]
    (folders[1] / "tokenizer.json").write_text("{}")
    for options, files in (({}, True), ({"max_shard_size": "5KB"}, True), ({"max_shard_size": "1GB"}, False)):
        out = merge_checkpoints(
            folders[0],
            {folders[1]: 0.5, folders[2]: 0.3},
            "task_arithmetic",
            tmp_path / "out",
            files_from=folders[1],
            overwrite=True,
            **options,
        )
        assert (out / "model.safetensors.index.json").exists() == files
        loaded = LlamaForCausalLM.from_pretrained(out, dtype="auto")
        assert loaded.generation_config.temperature == 0.25
        assert (out / "tokenizer.json").read_text() == "{}"
        states = [model.state_dict() for model in originals]
        for name, tensor in loaded.state_dict().items():
            thetas = [state[name] for state in states[1:]]
            want = eager_merge(states[0][name], thetas, [0.5, 0.3], method="task_arithmetic", name=name)
            assert equal_bits(tensor, want), name


def test_the_manifest_has_the_checksums_and_the_card_the_recipe(models, tmp_path):
    folders, _ = models(*[torch.float16] * 3, shapes=FILLED)
    out = merge_checkpoints(
        folders[1], {folders[0]: 0.5, folders[2]: 0.25}, "dare_ties", tmp_path / "merged", density=0.5
    )
    manifest = json.loads((out / "fused_merge.json").read_text())
    assert verify_checkpoint(out) == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    card = (out / "README.md").read_text()
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == manifest["recipe"]
    assert "# merged" in card
    assert "Yu et al. 2024 (arXiv 2311.03099)" in card


def rerun(recipe, out):
    """The call that a recipe tells of."""
    models = recipe["models"]
    densities = [model.get("density") for model in models]
    options = ("method", "normalize", "rescale", "scale", "trim", "seed", "dtype", "unmatched", "align_vocabulary")
    return plan_merge(
        None if recipe["base"] is None else recipe["base"]["path"],
        {model["path"]: model["weight"] for model in models},
        out=out,
        density=None if not any(densities) else densities,
        files_from=recipe["files_from"],
        max_shard_size=recipe["max_shard_size"],
        **{key: recipe[key] for key in options},
    )


@pytest.mark.parametrize("row", ROWS)
def test_a_recipe_is_everything_that_it_takes(row, models, tmp_path):
    method, weights, options = ROWS[row]
    options = dict(options)
    has_base = MERGE_METHODS[method].has_base
    folders, _ = models(*[torch.bfloat16] * (len(weights) + has_base))
    if "densities" in options:
        options["density"] = [{UP0: 0.25, ".*": 0.5}, *options.pop("densities")[1:]]
    weights = [{r".*\.layers\.0.*": np.float32(weights[0]), ".*": torch.tensor(0.5)}, *weights[1:]]
    out = tmp_path / "out"
    merge_checkpoints(
        folders[0] if has_base else None,
        dict(zip(folders[has_base:], weights, strict=True)),
        method,
        out,
        files_from=folders[-1],
        max_shard_size="3KB",
        dtype="float32",
        **options,
    )
    recipe = recipe_of(out)
    assert recipe["method"] == method
    again = rerun(recipe, out)
    assert again.identity == json.loads((out / "fused_merge.json").read_text())["plan"]
    again = rerun(recipe, tmp_path / "again" / "out").run()
    assert everything_in(again[0]) == everything_in(out)


# --- weights and densities by name


def test_weights_and_densities_by_regular_expression(models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.float32] * 3)
    weights = {UP0: 0.9, r"model\.layers\.\d+\..*": 0.6, ".*": 0.1}
    densities = {r".*layers.*": 0.4, ".*": 1.0}
    out = merge_checkpoints(
        folders[0], {folders[1]: weights, folders[2]: 0.3}, "ties", tmp_path / "out", density=[densities, 0.7]
    )
    made = load(out)
    for name, weight, density in ((UP0, 0.9, 0.4), (UP1, 0.6, 0.4), (NORM, 0.1, 1.0), (SCALAR, 0.1, 1.0)):
        thetas = [own[name] for own in tensors[1:]]
        want = eager_merge(tensors[0][name], thetas, [weight, 0.3], method="ties", name=name, densities=[density, 0.7])
        assert equal_bits(made[name], want)


def test_one_density_for_all_models_and_none_for_some(models, tmp_path):
    folders, tensors = models(*[torch.float32] * 3)
    weights = dict.fromkeys(folders[1:], 1.0)
    one = load(merge_checkpoints(folders[0], weights, "ties", tmp_path / "one", density=0.3))
    list_of = load(merge_checkpoints(folders[0], weights, "ties", tmp_path / "list", density=(0.3, 0.3)))
    some = load(merge_checkpoints(folders[0], weights, "ties", tmp_path / "some", density=[None, 0.3]))
    for name in SHAPES:
        thetas = [own[name] for own in tensors[1:]]
        want = {
            p: eager_merge(tensors[0][name], thetas, [1, 1], method="ties", name=name, densities=[p, 0.3])
            for p in (0.3, 1.0)
        }
        assert equal_bits(one[name], want[0.3])
        assert equal_bits(list_of[name], want[0.3])
        assert equal_bits(some[name], want[1.0])


def test_weights_of_tensors_that_are_not_merged_are_refused(models, tmp_path):
    folders, _ = models(torch.float32, torch.float32)
    with pytest.raises(ValueError, match="'count' of the weights matches no tensor"):
        merge_checkpoints(folders[0], {folders[1]: {"count": 1, ".*": 1}}, "ties", tmp_path / "out")


# --- tensors that are not merged, or not in all models


@pytest.mark.parametrize("leader", [0, 1, 2])
def test_integers_and_booleans_are_those_of_the_model_whose_files_go_along(leader, models, tmp_path, small_blocks):
    folders, _ = models(*[torch.float32] * 3)
    own = []
    for i, folder in enumerate(folders):
        file = sorted(folder.glob("*.safetensors"))[-1]
        own.append({"flag": torch.arange(9000) % (i + 2) == 0, "half": torch.full((3,), i, dtype=torch.uint16)})
        save_file({**load_file(file), **own[-1]}, file)
        if (index := folder / "model.safetensors.index.json").exists():
            listed = json.loads(index.read_text())["weight_map"]
            index.write_text(json.dumps({"weight_map": {**listed, "flag": file.name, "half": file.name}}))
    out = merge_checkpoints(
        folders[0], {folders[1]: 1, folders[2]: 1}, "ties", tmp_path / "out", files_from=folders[leader]
    )
    made = load(out)
    assert torch.equal(made["flag"], own[leader]["flag"])
    assert made["half"].dtype == torch.uint16
    assert made["half"].tolist() == [leader] * 3
    assert made["count"].tolist() == [*range(leader, leader + 5)]


def test_models_of_nothing_but_integers(tmp_path):
    folders = [write(tmp_path / name, {"count": torch.arange(4) + i}) for i, name in enumerate(NAMES)]
    for trim in ("tensor", "model"):
        out = merge_checkpoints(folders[0], {folders[1]: 1}, "ties", tmp_path / trim, density=0.5, trim=trim)
        assert load(out)["count"].tolist() == [0, 1, 2, 3]


def test_integers_do_not_count_in_a_trim_of_fp64_models(models, tmp_path):
    folders, _ = models(torch.float64, torch.float64)
    merge_checkpoints(folders[0], {folders[1]: 1}, "ties", tmp_path / "out", density=0.5, trim="model")


def test_tied_heads_stay_as_the_base_has_them(tmp_path):
    originals = [llama(i) for i in range(3)]
    folders = [save(model, tmp_path / name) for name, model in zip(NAMES, originals, strict=False)]
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folders[1] / "model.safetensors", {"format": "pt"})
    absent = merge_checkpoints(folders[0], {folders[1]: 0.5, folders[2]: 0.3}, "ties", tmp_path / "absent")
    assert "lm_head.weight" not in load(absent)
    present = load(merge_checkpoints(folders[1], {folders[0]: 0.5, folders[2]: 0.3}, "ties", tmp_path / "present"))
    assert equal_bits(present["lm_head.weight"], present["model.embed_tokens.weight"])
    # A head that two of the models leave out is trained apart from the embedding in the third.
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folders[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"base lacks 'lm_head.weight' of .*a; both must hold the same tensors"):
        merge_checkpoints(folders[0], {folders[1]: 0.5, folders[2]: 0.3}, "ties", tmp_path / "apart")


def test_tensors_that_not_all_hold(models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.bfloat16] * 3)
    adapter = torch.randn(5000).bfloat16()
    save_file({**load(folders[2]), "adapter": adapter}, folders[2] / "part-1.safetensors")
    (folders[2] / "part-0.safetensors").unlink()
    weight_map = dict.fromkeys([*tensors[2], "adapter"], "part-1.safetensors")
    (folders[2] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    arguments = folders[0], {folders[1]: 0.5, folders[2]: 0.3}, "ties"
    with pytest.raises(ValueError, match=r"base lacks 'adapter' of .*b; both must hold the same tensors"):
        merge_checkpoints(*arguments, tmp_path / "out")
    dropped = load(merge_checkpoints(*arguments, tmp_path / "drop", unmatched="drop"))
    assert dropped.keys() == {*SHAPES, "count"}
    copied = load(merge_checkpoints(*arguments, tmp_path / "copy", unmatched="copy"))
    assert equal_bits(copied.pop("adapter"), adapter)
    assert all(equal_bits(copied[name], dropped[name]) for name in dropped)
    as_fp32 = load(merge_checkpoints(*arguments, tmp_path / "fp32", unmatched="copy", dtype="float32"))
    assert equal_bits(as_fp32["adapter"], adapter.float())


ROWS_OF = {"embed.weight": (40, 30), "norm.weight": (30,)}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "slerp"])
@pytest.mark.parametrize("leader", [0, 1])
def test_vocabularies_of_two_sizes(method, leader, models, tmp_path, small_blocks):
    folders, tensors = models(torch.float32, torch.float32, shapes=ROWS_OF)
    longer = torch.cat([tensors[1]["embed.weight"], torch.randn(3, 30)])
    folders[1] = write(tmp_path / "longer", {**tensors[1], "embed.weight": longer})
    has_base = MERGE_METHODS[method].has_base
    weights = [0.3] if has_base else [0.4, 0.3]
    arguments = folders[0] if has_base else None, dict(zip(folders[has_base:], weights, strict=True)), method
    with pytest.raises(ValueError, match=r"'embed.weight' is \[40, 30\] and \[43, 30\]; resize one model to the voca"):
        merge_checkpoints(*arguments, tmp_path / "out")
    density = {} if method in ("linear", "slerp") else {"density": 0.5}
    out = merge_checkpoints(
        *arguments, tmp_path / "out", align_vocabulary=True, files_from=folders[leader], threads=3, **density
    )
    ends = tensors[0]["embed.weight"], longer[:40]
    want = eager_merge(
        ends[0] if has_base else None,
        ends[has_base:],
        weights,
        method=method,
        name="embed.weight",
        densities=[0.5] if density else None,
    )
    made = load(out)["embed.weight"]
    assert equal_bits(made[:40], want)
    assert equal_bits(made[40:], longer[40:] if leader else longer[:0])


# --- which models, and where


def test_bare_files_of_one_folder(tmp_path):
    files = []
    for i, name in enumerate(NAMES[:3]):
        files.append(tmp_path / "runs" / f"{name}.safetensors")
        files[-1].parent.mkdir(exist_ok=True)
        save_file(tensors_of(i), files[-1])
    out = merge_checkpoints(files[0], {files[1]: 0.5, str(files[2]): 0.5}, "ties", tmp_path / "runs" / "merged")
    assert sorted(os.listdir(out)) == ["README.md", "fused_merge.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "runs")) == ["a.safetensors", "b.safetensors", "base.safetensors", "merged"]
    with pytest.raises(ValueError, match=r"runs holds the input .*base.safetensors, which it would replace"):
        merge_checkpoints(files[0], {files[1]: 0.5}, "ties", tmp_path / "runs", overwrite=True)


def test_a_model_given_twice_counts_twice(models, tmp_path):
    folders, _ = models(torch.float32, torch.float32)
    twice = {folders[1]: 0.25, str(folders[1]): 0.25}
    made = load(merge_checkpoints(folders[0], twice, "task_arithmetic", tmp_path / "twice"))
    once = load(merge_checkpoints(folders[0], {folders[1]: 0.5}, "task_arithmetic", tmp_path / "once"))
    assert all(equal_bits(made[name], once[name]) for name in made)
    # Each time with a mask of its own.
    dare = [
        load(merge_checkpoints(folders[0], weights, "dare_linear", tmp_path / f"dare{i}", density=0.5))
        for i, weights in enumerate([twice, {folders[1]: 0.5}])
    ]
    assert not torch.equal(dare[0][UP0], dare[1][UP0])


def test_the_base_may_be_a_model_too(models, tmp_path):
    folders, tensors = models(torch.float32, torch.float32)
    made = load(merge_checkpoints(folders[0], {folders[0]: 0.5}, "task_arithmetic", tmp_path / "out"))
    assert all(equal_bits(made[name], tensors[0][name]) for name in SHAPES)


def test_spellings_of_the_model_whose_files_go_along(models, tmp_path, monkeypatch):
    folders, _ = models(*[torch.float32] * 3)
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({"from": folder.name}))
    monkeypatch.chdir(tmp_path)
    spellings = [(None, "base"), ("base", "base"), (Path("a"), "a"), ("a/", "a"), ("./b//", "b"), (Path("b"), "b")]
    for files_from, want in spellings:
        merge_checkpoints(
            "base", {"a/": 1, Path("b"): 1}, "ties", "out", files_from=files_from, overwrite=True, progress=False
        )
        assert json.loads(Path("out/config.json").read_text()) == {"from": want}
    # Without a base, it is a folder of that name.
    merge_checkpoints(None, {"a": 1, "base": 1}, "linear", "out", files_from="base", overwrite=True)
    assert json.loads(Path("out/config.json").read_text()) == {"from": "base"}
    merge_checkpoints(None, {"a": 1, "base": 1}, "linear", "out", overwrite=True)
    assert json.loads(Path("out/config.json").read_text()) == {"from": "a"}
    with pytest.raises(ValueError, match="files_from must be one of 'a', 'b', got 'base'"):
        merge_checkpoints(None, {"a": 1, "b": 1}, "linear", "out", files_from="base")
    with pytest.raises(ValueError, match="files_from must be one of 'base', 'a', got 'b'"):
        merge_checkpoints("base", {"a": 1}, "ties", "out", files_from="b")


def test_a_line_is_a_task_arithmetic_of_one_model(models, tmp_path):
    folders, _ = models(torch.bfloat16, torch.bfloat16)
    (line,) = interpolate_checkpoints(*folders, [0.25], tmp_path / "line")
    merged = merge_checkpoints(folders[0], {folders[1]: 0.25}, "task_arithmetic", tmp_path / "out")
    assert all(equal_bits(load(line)[name], load(merged)[name]) for name in SHAPES)


# --- sentences


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"method": "tie"}, ValueError, "unknown merge method 'tie'; the rows are 'linear', 'slerp', 'task_arith"),
        ({"base": None}, ValueError, "method 'ties' starts from a base; pass one"),
        ({"method": "linear"}, ValueError, "method 'linear' has no base; pass None, and it as a model"),
        ({"models": {}}, ValueError, "there is no model to merge; pass at least one"),
        ({"models": ["a", "b"]}, TypeError, "models must map paths to weights, got a list; write {path: weight}"),
        ({"models": {3: 1.0}}, TypeError, "a model must be the path of a safetensors file or a model folder, not a i"),
        ({"models": {"gone": 1.0}}, FileNotFoundError, "gone does not exist; give a local .safetensors file"),
        ({"models": {"a": "1"}}, TypeError, "a weight must be a number, got '1'"),
        ({"models": {"a": float("nan")}}, ValueError, "a weight must be finite, got nan"),
        ({"models": {"a": {"x": 1}}}, ValueError, "no weight is given for 'model.layers.0.mlp.up_proj.weight'"),
        ({"method": "slerp"}, ValueError, ".*: method 'slerp' goes from the base to one model, got 2 models"),
        ({"method": "slerp", "normalize": True}, ValueError, "method 'slerp' has no option 'normalize'"),
        ({"rescale": True}, ValueError, "method 'ties' has no option 'rescale': it drops nothing at random"),
        (
            {"method": "linear", "base": None, "models": {"a": 1, "b": -1}},
            ValueError,
            r"'model.layers.1.mlp.up_proj.weight': a mean of models divides by the sum of \[1.0, -1.0\]",
        ),
        ({"method": "linear", "base": None, "scale": 2}, ValueError, "method 'linear' has no option 'scale'"),
        ({"scale": float("inf")}, ValueError, "a scale must be finite, got inf"),
        ({"scale": "1"}, TypeError, "a scale must be a number, got '1'"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"density": [0.5]}, ValueError, "2 models need one density or as many, got 1"),
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, r"density must lie in \(0, 1\], got 1.5"),
        ({"density": {UP0: 0.5}}, ValueError, "no density is given for 'model.layers.1.mlp.up_proj.weight'"),
        ({"method": "task_arithmetic", "density": 0.5}, ValueError, "'task_arithmetic' has no option 'density'"),
        (
            {"trim": "layer"},
            ValueError,
            "trim must be 'tensor' or 'model', and 'model' only where something is trimmed",
        ),
        ({"trim": "model", "method": "dare_ties"}, ValueError, "got 'model' with method 'dare_ties'"),
        (
            {"trim": "model", "density": {UP0: 0.5, ".*": 0.25}},
            ValueError,
            "trim='model' chooses the largest of a whole model: give one density for each model",
        ),
        ({"files_from": "tuned"}, ValueError, "files_from must be one of 'base', 'a', 'b', got 'tuned'"),
        (
            {"dtype": "int8"},
            ValueError,
            "dtype must be 'bfloat16', 'float16', 'float32', 'float64' or None, got 'int8'",
        ),
        ({"unmatched": "keep"}, ValueError, "unmatched must be 'refuse' or 'copy' or 'drop', got 'keep'"),
        ({"max_shard_size": "big"}, ValueError, "max_shard_size must be a number of bytes such as .* got 'big'"),
    ],
)
def test_what_cannot_be_merged_is_said_before_anything_is_written(change, kind, message, models, tmp_path, monkeypatch):
    models(*[torch.float32] * 3)
    monkeypatch.chdir(tmp_path)
    arguments = {"base": "base", "models": {"a": 1.0, "b": 0.5}, "method": "ties", "out": "out"}
    with pytest.raises(kind, match=message):
        merge_checkpoints(**{**arguments, **change})
    assert sorted(os.listdir()) == ["a", "b", "base"]


def test_a_trim_over_models_of_two_precisions(models, tmp_path):
    folders, tensors = models(torch.float32, torch.float32)
    write(tmp_path / "mixed", {**tensors[1], NORM: tensors[1][NORM].double()})
    with pytest.raises(ValueError, match="give one density for each model, and tensors that are all float64 or none"):
        merge_checkpoints(
            folders[0], {tmp_path / "mixed": 1}, "ties", tmp_path / "out", density=0.5, trim="model", dtype="float32"
        )


def test_an_output_that_exists(models, tmp_path):
    folders, _ = models(torch.float32, torch.float32)
    out = merge_checkpoints(folders[0], {folders[1]: 1}, "ties", tmp_path / "out")
    (out / "old").touch()
    with pytest.raises(
        FileExistsError, match=r"out exists; pass overwrite=True to replace a folder, or choose another"
    ):
        merge_checkpoints(folders[0], {folders[1]: 0.5}, "ties", tmp_path / "out")
    merge_checkpoints(folders[0], {folders[1]: 0.5}, "ties", tmp_path / "out", overwrite=True)
    assert not (out / "old").exists()
    assert sorted(os.listdir(tmp_path)) == ["a", "base", "out"]


# --- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("row", ROWS)
def test_a_gpu_makes_the_same_bytes(row, mix, models, tmp_path, small_blocks):
    method, weights, options = ROWS[row]
    dtypes, dtype = MIXES[mix]
    has_base = MERGE_METHODS[method].has_base
    folders, _ = models(*dtypes[: len(weights) + has_base])
    asked = {key: value for key, value in options.items() if key != "densities"}
    made = [
        merge_checkpoints(
            folders[0] if has_base else None,
            dict(zip(folders[has_base:], weights, strict=True)),
            method,
            tmp_path / device / "out",
            density=options.get("densities"),
            dtype=dtype,
            device=device,
            **asked,
        )
        for device in ("cpu", "cuda")
    ]
    assert everything_in(made[0]) == everything_in(made[1])


def test_a_share_of_the_files_takes_its_own_tensors_or_the_whole_model(models, tmp_path):
    folders, _ = models(torch.float32, torch.float32)
    for trim in ("tensor", "model"):
        job = plan_merge(folders[1], {folders[0]: 1}, "ties", tmp_path / "out", density=0.5, trim=trim)
        first, second = ([file] for file in job.files)
        shares = [job.whole_tensor_pass.bytes_read(job.files, mine) for mine in (first, second)]
        whole = job.whole_tensor_pass.bytes_read(job.files, job.files)
        assert shares == [whole, whole] if trim == "model" else (sum(shares) == whole and all(shares))
