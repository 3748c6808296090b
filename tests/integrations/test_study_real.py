"""The study on a real model: how data is read, what a start holds, and that a killed run goes on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parents[2] / "bench/alignment_tax"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench/study"))

import plan
import real
import real_data
import real_scores
import small_study
import torch
from data import build_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

ALGORITHMS = ("dpo",)
CONTENDERS = ("AdamW", "early stop", "LoRA", "OnDARE")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_study.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run in one go: its folder and its points."""
    out = tmp_path_factory.mktemp("finished")
    # What a run that was killed while it prepared has left.
    (out / "seed0.part/base").mkdir(parents=True)
    (out / "seed0.part/base/model-00001-of-00002.safetensors").write_bytes(b"half a file")
    return out, small_study.study(out, data, ALGORITHMS, CONTENDERS)


# ---------------------------------------------------------------- data


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def written(folder: Path, rows: list[dict]) -> str:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return str(file)


def test_strings_stay_strings_and_every_prompt_is_there_once(tmp_path):
    name = written(
        tmp_path,
        [
            {"prompt": "a ", "chosen": "b", "rejected": "c"},
            {"prompt": "a ", "chosen": "d", "rejected": "e"},
            {"prompt": "too long", "chosen": "b", "rejected": "c"},
        ],
    )
    rows = real_data.preference_rows(name, build_tokenizer(), longest=7)
    assert rows == [{"prompt": "a ", "messages": None, "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize("prompt", ["none", "string", "messages"])
def test_conversations_are_rendered_once(prompt, tmp_path):
    whole = prompt != "messages"
    row = {
        key: chat("hi", text) if whole else chat("hi", text)[1:] for key in ("chosen", "rejected") for text in (key,)
    }
    row |= {"none": {}, "string": {"prompt": "hi"}, "messages": {"prompt": chat("hi")}}[prompt]
    tokenizer = build_tokenizer()
    [found] = real_data.preference_rows(written(tmp_path, [row]), tokenizer, longest=99)
    assert found == {
        "prompt": "User:\nhi\n\nAssistant:\n",
        "messages": chat("hi"),
        "chosen": "chosen",
        "rejected": "rejected",
    }
    assert tokenizer.chat_template == real_data.PLAIN_TEMPLATE  # saved with the models


def test_a_string_is_a_message_where_there_is_a_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "[bos]" + real_data.PLAIN_TEMPLATE
    assert real_data.rendered("hi", tokenizer) == (chat("hi"), "[bos]User:\nhi\n\nAssistant:\n")


def test_what_the_tokenizer_adds_is_not_there_twice():
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + real_data.PLAIN_TEMPLATE
    tokenizer.add_special_tokens({"bos_token": "[eos]"})
    assert real_data.rendered("hi", tokenizer)[1].startswith("[eos]User")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="[eos] $A", special_tokens=[("[eos]", tokenizer.bos_token_id)]
    )
    assert real_data.rendered("hi", tokenizer)[1].startswith("User")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "a", "chosen": "b"}], "has no column 'rejected', only 'question', 'chosen'"),
        ([{"question": "a", "chosen": "b", "rejected": "c"}], "has no column 'prompt'; rename its columns to prompt"),
    ],
)
def test_columns_that_are_missing(rows, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        real_data.preference_rows(written(tmp_path, rows), build_tokenizer(), longest=9)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"no dataset .*nothing.json .*; give a folder, a .json file or NAME"):
        real_data.read_dataset(str(tmp_path / "nothing.json"), ())


def test_a_folder_that_datasets_has_saved(tmp_path):
    Dataset.from_list([{"prompt": "1 + 1 =", "answer": 2}]).save_to_disk(tmp_path / "saved")
    assert real_data.task_rows(str(tmp_path / "saved"), build_tokenizer()) == [real_data.Example("1 + 1 =", "2")]


def test_tasks_as_plain_text():
    tasks = real_scores.few_shot_tasks(2)
    assert len(tasks) == 14
    *solved, asked = tasks[0].prompt.split("\n")
    assert len(solved) == real_scores.SHOTS
    for line in [*solved, f"{asked} {tasks[0].answer}"]:
        name, question, _, answer = line.split(" ")
        assert (name, question) == ("copy", answer)
    assert [real_scores.first_line(text) for text in (" hhf\ncopy", "hhf ", "\nhhf", "")] == ["hhf", "hhf", "hhf", ""]


# ---------------------------------------------------------------- the command line


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    real.add_arguments(parser)
    return parser.parse_args(["--model", "m", "--device", "cpu", *words])


def test_the_command_line_makes_world_and_size(tmp_path):
    arguments = parsed("--dataset", "d", "--batch", "32", "--steps", "50", "--lr", "5e-7")
    world = real.from_arguments(arguments, plan.QUICK, tmp_path)
    assert (world.model, world.dataset, world.device, world.lr) == ("m", "d", "cpu", 5e-7)
    assert (world.size.batch, world.size.steps, world.size.prompts) == (32, 50, 1600)
    assert world.size.algorithms == plan.QUICK.algorithms


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--model needs --dataset"),
        (("--dataset", "d", "--batch", "6"), "--batch 6 must be a multiple of 4"),
        (("--dataset", "d", "--max-length", "256"), "--max-length 256 must be more than --new-tokens 256"),
    ],
)
def test_options_that_do_not_fit(words, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        real.from_arguments(parsed(*words), plan.QUICK, tmp_path)


def test_the_launcher_reads_its_file():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(Path(real.__file__).parent / "fsdp2.yaml"))
    assert (config.distributed_type, config.fsdp_config["fsdp_version"]) == ("FSDP", 2)


# ---------------------------------------------------------------- a start


def test_a_start_has_been_trained_on_its_half(finished, data):
    out, _ = finished
    start = small_study.world(out, data, *ALGORITHMS).start(0)
    assert {path.name for path in start.folder.iterdir()} == {"base", "sft", "reward", "data.json", "rows.json"}
    assert all(tensor.any() for name, tensor in start.tau.items() if "layers" in name)
    rows = json.loads((start.folder / "rows.json").read_text())
    prompts = {kind: {row["prompt"] for row in rows[kind]} for kind in rows}
    assert {kind: len(found) for kind, found in prompts.items()} == {"examined": 6, "sft": 16, "preferences": 12}
    assert len(set.union(*prompts.values())) == 34
    assert {pair["prompt"] for pair in start.data["pairs"]} == prompts["preferences"]

    batch = next(start.replay(3))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        asked = start.tokenizer.decode(ids[labels == -100], skip_special_tokens=True)
        answer = start.tokenizer.decode(ids[labels != -100])
        [row] = [row for row in rows["sft"] if row["prompt"] == asked]
        assert answer == row["chosen"] + "[eos]"


def test_held_out_prompts_are_those_of_every_seed(finished, data):
    out, _ = finished
    world = small_study.world(out, data, *ALGORITHMS)
    one, two = (world.split(build_tokenizer(), seed) for seed in (0, 1))
    assert one["examined"] == two["examined"]
    assert one["sft"] != two["sft"]


def test_the_reward_is_the_saved_model(finished, data):
    out, _ = finished
    start = small_study.world(out, data, *ALGORITHMS).start(0)
    model = AutoModelForSequenceClassification.from_pretrained(start.folder / "reward")
    prompt = start.data["prompts"][0]
    ids = start.tokenizer(prompt + "abc[eos]", return_tensors="pt")["input_ids"]
    assert start.reward([prompt, prompt], ["abc", "a"])[0] == pytest.approx(model(ids).logits.item(), rel=1e-5)


def test_a_finished_sft_and_a_finished_reward_model(finished, data, tmp_path):
    out, _ = finished
    sft, judge = out / "seed0/sft", out / "seed0/reward"
    world = replace(small_study.world(tmp_path, data, *ALGORITHMS), sft=str(sft), reward=str(judge))
    world.prepare(0)
    start = world.start(0)
    assert not (start.folder / "reward").exists()
    assert load_file(start.folder / "sft/model.safetensors").keys() == start.sft.keys()
    for name, tensor in load_file(sft / "model.safetensors").items():
        assert torch.equal(start.sft[name], tensor)

    model, tokenizer = start.reward.loaded
    prompt = start.data["prompts"][0]
    pair = model(**tokenizer(prompt, "abc", return_tensors="pt")).logits.item()
    assert start.reward([prompt], ["abc"]) == [pytest.approx(pair)]
    tokenizer.chat_template = real_data.PLAIN_TEMPLATE
    text = f"User:\n{prompt}\n\nAssistant:\nabc\n\n"
    assert start.reward([prompt], ["abc"]) == [
        pytest.approx(model(**tokenizer(text, return_tensors="pt")).logits.item())
    ]


@pytest.mark.parametrize(
    ("option", "layers", "said"),
    [
        ("model", 5, "the model cannot be cut into 6 parts"),
        ("sft", 7, r"differ in 'model.layers.6.input_layernorm.weight'; --sft takes a fine-tuning of --model"),
    ],
)
def test_models_that_do_not_fit(option, layers, said, data, tmp_path):
    other = small_study.write_model(tmp_path / "other", layers)
    world = replace(small_study.world(tmp_path / "out", data, *ALGORITHMS), **{option: str(other)})
    with pytest.raises(SystemExit, match=said):
        world.prepare(0)


def test_more_parts_than_layers(finished, data):
    out, _ = finished
    start = small_study.world(out, data, *ALGORITHMS).start(0)
    assert start.parts(3, 0.5).ratios == (0.5, 0.5, 0.5)
    with pytest.raises(SystemExit, match="the model cannot be cut into 7 parts"):
        start.parts(7, 0.5)


def test_too_few_prompts(tmp_path, data):
    world = small_study.world(tmp_path, data, *ALGORITHMS, examined_prompts=37)
    with pytest.raises(SystemExit, match=r"38 different prompts .* 37 are held out and two more needed"):
        world.split(build_tokenizer(), 0)


# ---------------------------------------------------------------- runs


def test_every_model_is_measured_and_adamw_kept(finished):
    out, points = finished
    families = {point.family for point in points}
    assert families > {"base", "sft", *CONTENDERS, "uniform", "high third", "adaptive, K = 2, reward"}
    [adamw] = [point for point in points if point.family == "AdamW"]
    assert adamw.cosine != 0.0
    kept = load_file(out / "runs/seed0/order0/dpo/AdamW@1/model.safetensors")
    sft = load_file(out / "seed0/sft/model.safetensors")
    assert kept.keys() == sft.keys()
    assert not torch.equal(kept["model.norm.weight"], sft["model.norm.weight"])


def test_a_killed_run_goes_on_to_the_same_points(finished, data, tmp_path):
    _, expected = finished
    call = f"small_study.study(Path({str(tmp_path)!r}), Path({str(data)!r}), {ALGORITHMS!r}, {CONTENDERS!r})"
    # Both import their own small_study: a program that is killed, and this test.
    program = f"import small_study; from pathlib import Path; {call}"
    environment = os.environ | {"PYTHONPATH": str(Path(small_study.__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    trainings = tmp_path / "runs/seed0/order0/dpo"
    while not (done := [*trainings.glob("*.json")]) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    times = {file: file.stat().st_mtime_ns for file in done}
    assert len(times) < 3
    assert small_study.study(tmp_path, data, ALGORITHMS, CONTENDERS) == expected
    assert {file: file.stat().st_mtime_ns for file in done} == times
