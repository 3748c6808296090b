"""The tuned model's own answers, and the command that finds ratios on them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from bits import same_bits
from safetensors.torch import load_file
from tiny import llama, save
from word_tokens import tokenizer

from fused_merge import LayerRatios, functional
from fused_merge.adapt.adapt import answer_loss
from fused_merge.adapt.answers import (
    Answer,
    adapt_checkpoints,
    answer_batches,
    best_answers,
    read_prompts,
    sample_answers,
)
from fused_merge.cli.commands import app

PROMPTS = ["w3 w4", "w5", "w6 w7 w8", "w9 w10", "w11"]


@pytest.fixture
def folders(tmp_path):
    base, tuned = (save(llama(seed), tmp_path / name) for seed, name in enumerate(["base", "tuned"]))
    tokenizer().save_pretrained(tuned)
    return base, tuned


def test_answers_are_sampled_once_and_for_all():
    model = llama(0).eval()
    state = torch.random.get_rng_state()
    answers, again, other = (
        sample_answers(model, tokenizer(), PROMPTS, max_new_tokens=6, batch_size=2, seed=seed, progress=False)
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [answer.prompt for answer in answers] == [[3, 4], [5], [6, 7, 8], [9, 10], [11]]
    assert all(1 <= len(answer.answer) <= 6 and 2 not in answer.answer[:-1] for answer in answers)
    assert answers == again != other


def test_the_likeliest_answer_depends_on_its_own_prompt_alone():
    model = llama(0).eval()
    options = {"max_new_tokens": 4, "temperature": 0.0, "progress": False}
    together, alone = (sample_answers(model, tokenizer(), PROMPTS, batch_size=size, **options) for size in (8, 1))
    assert together == alone
    with torch.no_grad():
        first = model(torch.tensor([[3, 4]])).logits[0, -1].argmax()
    assert together[0].answer[0] == first


def test_only_answers_are_learnt():
    answers = [Answer([3, 4], [5, 2], ""), Answer([6], [7, 8, 9], ""), Answer([3], [2], "")]
    first, second = answer_batches(answers, batch_size=2, padding=1)
    assert first["input_ids"].tolist() == [[3, 4, 5, 2], [6, 7, 8, 9]]
    assert first["labels"].tolist() == [[-100, -100, 5, 2], [-100, 7, 8, 9]]
    assert first["attention_mask"].tolist() == [[1] * 4] * 2
    assert second["input_ids"].tolist() == [[3, 2]]
    (padded,) = answer_batches(answers, padding=1)
    assert padded["input_ids"][2].tolist() == [3, 2, 1, 1]
    assert padded["attention_mask"][2].tolist() == [1, 1, 0, 0]
    assert padded["labels"][2].tolist() == [-100, 2, -100, -100]
    model = llama(0).eval()
    logits = model(torch.tensor([[3, 4, 5, 2]])).logits.log_softmax(-1)[0]
    expected = -(logits[1, 5] + logits[2, 2]) / 2
    (single,) = answer_batches(answers[:1], padding=1)
    assert answer_loss(model, single).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_best_answers_stay_in_their_order():
    answers = [Answer([i], [i], str(i)) for i in range(5)]
    assert [a.text for a in best_answers(answers, [0.0, 3.0, 1.0, 2.0, -1.0], 0.4)] == ["1", "3"]
    assert len(best_answers(answers, [0.0] * 5, 0.01)) == 1
    for rewards, share, message in (
        ([1.0], 0.5, r"one finite number for each of 5 answers, got \[1\.0\]"),
        ([float("nan")] * 5, 0.5, "one finite number for each of 5 answers"),
        ([1.0] * 5, 0, r"must lie in \(0, 1\], got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            best_answers(answers, rewards, share)


def test_a_model_with_the_ratios_that_were_found(folders, tmp_path):
    folder = adapt_checkpoints(
        *folders, PROMPTS, tmp_path / "out", mean_ratio=0.5, parts=2, steps=4, max_new_tokens=4, progress=False
    )
    assert folder == tmp_path / "out" / "model"
    found = LayerRatios.load(tmp_path / "out" / "ratios.json")
    assert found.mean == pytest.approx(0.5, abs=1e-9)
    assert found.ratios[0] != found.ratios[1]
    assert len(found.history) == 4
    base, tuned, made = (load_file(path / "model.safetensors") for path in (*folders, folder))
    for name, tensor in made.items():
        ((point,),) = functional.interpolate([base[name]], [tuned[name]], [found[name]])
        assert same_bits(tensor, point)
    with pytest.raises(FileExistsError, match=r"model exists"):
        adapt_checkpoints(*folders, PROMPTS, tmp_path / "out", progress=False)


def test_the_command(folders, tmp_path, capsys, monkeypatch):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments])
        return end.value.code or 0, *capsys.readouterr()

    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (tmp_path / "judges.py").write_text(
        "def longest(pairs):\n"
        "    print(len(pairs), 'answers')\n"
        "    assert all(isinstance(text, str) for pair in pairs for text in pair)\n"
        "    return [len(answer) for _, answer in pairs]\n"
    )
    monkeypatch.chdir(tmp_path)
    asked = ["adapt", *folders, "--prompts", "prompts.jsonl", "--out", "out", "--parts", 2, "--steps", 3]
    code, printed, errors = run(*asked, "--max-new-tokens", 4, "--reward", "judges:longest", "--json")
    assert (code, "5 answers" in errors) == (0, True)
    document = json.loads(printed)
    assert document["path"] == "out/model"
    assert sum(document["ratios"].values()) / 2 == pytest.approx(0.4, abs=1e-9)
    code, printed, errors = run(*asked[:-4], "--mean-ratio", 1.5)
    assert (code, printed) == (1, "")
    assert errors.startswith("error: ")


def test_a_model_that_a_function_loads(folders, tmp_path, monkeypatch):
    for folder in folders:
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "architectures": ["Own"]}
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "own_words.py").write_text(
        "from tiny import llama\n"
        "from word_tokens import tokenizer\n"
        "class Processor:\n"
        "    tokenizer = tokenizer()\n"
        "def load(folder, device, dtype):\n"
        "    assert folder.name == 'tuned'\n"
        "    return llama(1).to(device, dtype), Processor()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    short = {"steps": 2, "parts": 2, "max_new_tokens": 4, "progress": False}
    with pytest.raises(ValueError, match=r"holds a Own, which neither .*; pass loader='module:function'"):
        adapt_checkpoints(*folders, PROMPTS, tmp_path / "out", **short)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert adapt_checkpoints(*folders, PROMPTS, "~/out", loader="own_words:load", **short) == tmp_path / "out/model"
    assert sum(LayerRatios.load(tmp_path / "out/ratios.json").ratios) / 2 == pytest.approx(0.4, abs=1e-9)


def test_prompts_of_files_and_none(folders, tmp_path):
    with pytest.raises(ValueError, match="there is no prompt"):
        adapt_checkpoints(*folders, [], tmp_path / "out")
    (tmp_path / "p.txt").write_text("a b\n\n c\n")
    assert read_prompts(tmp_path / "p.txt") == ["a b", " c"]
    for text, message in (
        ('{"prompt": "a"}\nno', r"line 2 of .*p\.jsonl is no JSON object with a 'prompt'"),
        ('{"text": "a"}', r"line 1 of .*p\.jsonl is no JSON object with a 'prompt'"),
        ('{"prompt": 3}', r"the 'prompt' in line 1 of .*p\.jsonl is no text"),
    ):
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / "p.jsonl")
