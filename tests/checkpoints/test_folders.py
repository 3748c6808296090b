"""What stands beside the weights: what goes along, from which model, and what stays behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import recipe_of
from safetensors.torch import load_file, save_file
from tiny import llama, save
from transformers import LlamaForCausalLM

from fused_merge.checkpoints import folders as folders_module
from fused_merge.checkpoints.folders import beside
from fused_merge.checkpoints.interpolate import interpolate_checkpoints, plan_interpolation
from fused_merge.io.sources import open_files
from fused_merge.merge.merge import merge_checkpoints

ENDS = [0, 0.5, 1]


def put(folder: Path, *names: str) -> None:
    """Files that hold the name of their folder, and their own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def pair(tmp_path):
    """Two folders with a tensor and a configuration."""
    made = []
    for i, name in enumerate(("base", "tuned")):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3,), float(i))}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"rope_theta": 10.0**i}))
        made.append(tmp_path / name)
    return made


SMALL = [
    *("generation_config.json", "modules.json", "1_Pooling/config.json", "tekken.json", "source.spm", "LICENSE"),
    *("additional_chat_templates/tool_use.jinja", "params.json", "modeling_x.py", "assets/deep/er/logo.svg", "NOTICE"),
    *("assets/README.md", "sub/model.json", "tokenizer.json", "vocab.bpe", "chat_template.jinja", "merges.txt"),
]
STAY = {
    "weights": [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "sub/tf_model.h5", "flax_model.msgpack"),
        *("consolidated.00.pth", "adapter_config.json", "original/params.json", "model-00001-of-2.safetensors"),
    ],
    "training state": [
        *("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin", "latest"),
        *("all_results.json", "zero_to_fp32.py", "runs/x/events.out.tfevents.1", "wandb/run", "global_step9/x"),
        *("checkpoint-5/config.json", "checkpoint-5/tokenizer.json"),
    ],
    "unfinished": ["config.json.part"],
}
OURS = {"README.md", "fused_merge.json", "config.json", "model.safetensors"}


def test_everything_small_goes_along_and_what_stays_behind_is_named(pair, tmp_path, caplog):
    _, tuned = pair
    put(tuned, *SMALL, *(name for names in STAY.values() for name in names))
    put(tuned, ".gitattributes", ".cache/x", "ReadMe.md", "fused_merge.json", "other/config.json", "other/model.bin")
    with (tuned / "data.json").open("wb") as file:
        file.truncate(folders_module.LARGEST + 1)
    (tuned / "outside").symlink_to(tmp_path)
    (tuned / "loop").symlink_to(tuned)
    (tuned / "assets" / "up").symlink_to(tuned / "assets")
    (tuned / "gone.json").symlink_to(tuned / "nothing")
    # As in the cache of the Hugging Face hub.
    (tmp_path / "blob").write_text("tuned linked.json")
    (tuned / "linked.json").symlink_to(tmp_path / "blob")
    (tuned / "same").symlink_to(tuned / "1_Pooling")

    plan = plan_interpolation(*pair, [1], tmp_path / "out", max_shard_size=None)
    expected = {"data.json": "100 MB", "other": "another model", "gone.json": "not readable"}
    expected |= dict.fromkeys(["outside", "loop", "assets/up"], "a link to another folder")
    for why, names in STAY.items():
        tops = ("checkpoint-5", "runs", "wandb", "global_step9", "original")
        expected |= {name.split("/")[0] if name.startswith(tops) else name: why for name in names}
    assert plan.describe()["left_behind"] == {str(tuned / name): why for name, why in expected.items()}
    (sentence,) = [each for each in caplog.messages if "stays behind" in each]
    assert f"{tuned / 'data.json'} (100 MB)" in sentence
    assert sentence.endswith(f"and {len(expected) - 8} more; copy what the outputs need")

    (folder,) = plan.run(progress=False)
    assert names_in(folder) == {*SMALL, *OURS, "linked.json", "same/config.json"}
    assert all((folder / name).read_text() == f"tuned {name}" for name in (*SMALL, "linked.json"))
    assert plan.bytes_written == sum(
        (folder / name).stat().st_size for name in names_in(folder) - {"README.md", "fused_merge.json"}
    )


def test_outputs_within_an_input_do_not_go_along(pair):
    base, _ = pair
    made = interpolate_checkpoints(*pair, [0], base / "line")
    assert interpolate_checkpoints(*pair, [0], base / "line") == made
    assert names_in(made[0]) == OURS


# --- from which model

CONFIG = ["generation_config.json", "modeling_x.py", "1_Pooling/config.json"]
TOKENIZER = ["tokenizer.json", "chat_template.jinja", "tokenization_x.py", "preprocessor_config.json"]


@pytest.mark.parametrize("config_from", [None, "base", "tuned"])
@pytest.mark.parametrize("tokenizer_from", [None, "base", "tuned"])
def test_configuration_and_tokenizer_of_each_output(config_from, tokenizer_from, pair, tmp_path):
    for folder in pair:
        put(folder, *CONFIG, *TOKENIZER, f"{folder.name}_tokenizer.model", f"{folder.name}.txt")
    options = {"config_from": config_from, "tokenizer_from": tokenizer_from}
    made = interpolate_checkpoints(*pair, ENDS, tmp_path / "out", **options)
    for folder, own in zip(made, ["base", "tuned", "tuned"], strict=True):
        config, tokenizer = config_from or own, tokenizer_from or "tuned"
        assert (folder / "config.json").read_bytes() == (tmp_path / config / "config.json").read_bytes()
        assert all((folder / name).read_text() == f"{config} {name}" for name in CONFIG)
        assert all((folder / name).read_text() == f"{tokenizer} {name}" for name in TOKENIZER)
        assert names_in(folder) == {*OURS, *CONFIG, *TOKENIZER, f"{tokenizer}_tokenizer.model", f"{config}.txt"}
        assert {name: recipe_of(folder)[name] for name in options} == options
    with pytest.raises(ValueError, match="config_from must be 'base' or 'tuned' or None, got 'sft'"):
        interpolate_checkpoints(*pair, [0.5], tmp_path, config_from="sft")


def test_what_one_end_lacks_comes_from_the_other(pair, tmp_path):
    base, tuned = pair
    put(base, "tokenizer.json")
    (tuned / "config.json").unlink()
    for folder in interpolate_checkpoints(*pair, ENDS, tmp_path / "out"):
        assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
        assert (folder / "tokenizer.json").read_text() == "base tokenizer.json"
    put(tuned, "tokenizer.json")
    bare = shutil.move(base / "model.safetensors", tmp_path / "bare.safetensors")
    for folder in interpolate_checkpoints(bare, tuned, ENDS, tmp_path / "bare"):
        assert names_in(folder) == OURS - {"config.json"} | {"tokenizer.json"}


def test_the_base_with_another_rope_theta_is_the_base_at_its_end(tmp_path):
    models = [llama(i) for i in range(2)]
    models[0].config.rope_parameters = {"rope_type": "default", "rope_theta": 10.0}
    paths = [save(model, tmp_path / name) for model, name in zip(models, ("base", "tuned"), strict=True)]
    tokens = torch.arange(40)[None]
    made = interpolate_checkpoints(*paths, [0, 1], tmp_path / "line")
    for path, folder in zip(paths, made, strict=True):
        logits = [LlamaForCausalLM.from_pretrained(each)(tokens).logits for each in (path, folder)]
        assert torch.equal(*logits)


def test_a_vocabulary_of_another_size_has_no_configuration_and_no_tokenizer_for_the_outputs(tmp_path):
    paths = [save(llama(i, vocabulary=40 + i), tmp_path / name) for i, name in enumerate(("base", "tuned"))]
    for folder in paths:
        put(folder, "tokenizer.json")
    for config_from, chosen in ((None, 1), ("base", 0), ("tuned", 1)):
        out = tmp_path / str(config_from)
        for folder in interpolate_checkpoints(*paths, ENDS, out, align_vocabulary=True, config_from=config_from):
            assert json.loads((folder / "config.json").read_text())["vocab_size"] == 40 + chosen
            assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 40 + chosen
            assert (folder / "tokenizer.json").read_text() == f"{paths[chosen].name} tokenizer.json"


def test_the_tokenizer_of_a_merge_has_a_chat_template_where_one_has(pair, tmp_path):
    base, tuned = pair
    put(base, "tokenizer.json")
    put(tuned, "tokenizer.json")
    models = base, {tuned: 0.5}, "task_arithmetic", tmp_path / "out"

    def merged(**options):
        folder = merge_checkpoints(*models, overwrite=True, **options)
        assert json.loads((folder / "config.json").read_text()) == {"rope_theta": 1.0}
        assert recipe_of(folder)["config_from"] == str(base)
        name = (folder / "tokenizer.json").read_text().split()[0]
        assert recipe_of(folder)["tokenizer_from"] == str(tmp_path / name)
        return name

    assert merged() == "base"
    (tuned / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert merged() == "tuned"
    assert merged(tokenizer_from="base") == "base"
    put(base, "chat_template.jinja")
    assert merged() == "base"
    assert merged(tokenizer_from=tuned) == "tuned"
    with pytest.raises(ValueError, match=r"tokenizer_from must be one of '.*base', '.*tuned', got 'sft'"):
        merged(tokenizer_from="sft")


def test_never_two_chat_templates(pair):
    _, tuned = pair
    config = {"chat_template": "old", "model_max_length": 10**30, "pad_token": "é"}
    (tuned / "tokenizer_config.json").write_text(json.dumps(config))
    source = open_files(tuned)
    assert beside(source, source).files["tokenizer_config.json"] == tuned / "tokenizer_config.json"
    put(tuned, "chat_template.jinja")
    del config["chat_template"]
    assert json.loads(beside(source, source).files["tokenizer_config.json"]) == config
    put(tuned, "tokenizer_config.json")
    assert beside(source, source).files["tokenizer_config.json"] == tuned / "tokenizer_config.json"


# --- what a configuration says


def test_values_that_a_caller_puts_into_a_configuration(pair):
    base, _ = pair
    config = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False, "dtype": "bfloat16"}}
    (base / "config.json").write_text(json.dumps(config))
    source = open_files(base)
    assert beside(source, source).files == {"config.json": base / "config.json"}
    made = beside(source, source, torch.float32, {"tie_word_embeddings": True, "x": 1})
    wanted = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "dtype": "float32"}, "x": 1}
    assert made.config == json.loads(made.files["config.json"]) == wanted


def test_what_a_configuration_declares_and_no_output_has_is_said(pair, tmp_path, caplog):
    for folder in pair:
        (folder / "config.json").write_text('{"mtp_num_hidden_layers": 1}')
    plan_interpolation(*pair, ENDS, tmp_path / "out")
    sentence = "the config.json of an output declares mtp_num_hidden_layers = 1, but no tensor that is written belongs"
    assert [message[: len(sentence)] for message in caplog.messages] == [sentence]
