"""The aligned model's own answers as training data: the proxy that adaptive averaging keeps close to.

Source: Lin et al. 2024 (arXiv 2309.06256), who sample answers of the aligned model, keep those that the reward model
likes best, and find the ratios that make them likely.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fused_merge.adapt.adapt import adapt_ratios, answer_loss
from fused_merge.adapt.options import AnswerOptions, SamplingOptions, TargetOptions
from fused_merge.checkpoints.interpolate import plan_interpolation
from fused_merge.functional.backend import check_device
from fused_merge.io.files import expanded
from fused_merge.io.mergeable import check_mergeable
from fused_merge.io.options import PairingOptions
from fused_merge.io.sources import PathLike, open_files
from fused_merge.io.transformers import ModelLoader, import_function, stored_dtype, text_tokenizer
from fused_merge.options import documented, resolve, select, split
from fused_merge.options import share as check_share
from fused_merge.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

RATIOS = "ratios.json"
MODEL = "model"


class Answer(NamedTuple):
    """A prompt and what a model said, as tokens and as text."""

    prompt: list[int]
    answer: list[int]
    text: str


@documented(SamplingOptions)
def sample_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], **options: Unpack[SamplingOptions]
) -> list[Answer]:
    """Return the answers of a causal language model of Transformers, in the order of the prompts, less empty ones.

    Args:
        model: the model.
        tokenizer: its tokenizer; with a chat template each prompt is one message of a user.
        prompts: texts.
        {options}
    """
    o = resolve(options, SamplingOptions)
    temperature, end = o["temperature"], tokenizer.eos_token_id
    answers = []
    devices = [model.device] if model.device.type == "cuda" else []
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    # What the model's own configuration says beside the temperature would be another distribution.
    drawn: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0.0 else {}
    drawn |= {"do_sample": bool(drawn), "max_new_tokens": o["max_new_tokens"], "pad_token_id": padding}
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices),
        progress_bar("answering", len(prompts), unit="prompts", enabled=o["progress"]) as advance,
    ):
        torch.manual_seed(o["seed"])
        for first in range(0, len(prompts), o["batch_size"]):
            asked = [_tokens(tokenizer, prompt) for prompt in prompts[first : first + o["batch_size"]]]
            # Padded on the left, so that all answers begin at one place.
            ids = _padded(asked, padding, model.device, left=True)
            mask = _padded([[1] * len(tokens) for tokens in asked], 0, model.device, left=True)
            made = model.generate(input_ids=ids, attention_mask=mask, **drawn)
            for tokens, answer in zip(asked, made[:, ids.shape[1] :].tolist(), strict=True):
                if end in answer:
                    answer = answer[: answer.index(end) + 1]
                if answer and answer != [end]:
                    answers.append(Answer(tokens, answer, tokenizer.decode(answer, skip_special_tokens=True)))
            advance(len(asked))
    return answers


def answer_batches(
    answers: Sequence[Answer], *, batch_size: int = 8, padding: int = 0, device: torch.device | str = "cpu"
) -> list[dict[str, torch.Tensor]]:
    """Return batches for `answer_loss`, in the order of the answers: only the tokens of answers are learned.

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels`, int64 `[batch, tokens]`, with `padding` at the right.
    """
    batches = []
    for first in range(0, len(answers), batch_size):
        chosen = answers[first : first + batch_size]
        tokens = [prompt + answer for prompt, answer, _ in chosen]
        labels = [[-100] * len(prompt) + answer for prompt, answer, _ in chosen]
        masks = [[1] * len(row) for row in tokens]
        columns = {"input_ids": (tokens, padding), "attention_mask": (masks, 0), "labels": (labels, -100)}
        batches.append({key: _padded(rows, value, device) for key, (rows, value) in columns.items()})
    return batches


def best_answers(answers: Sequence[Answer], rewards: Sequence[float], share: float) -> list[Answer]:
    """Return the answers of the highest rewards, in their order: a share in (0, 1] of all, but at least one.

    Raises:
        ValueError: if there is not one finite reward for each, or `share` is out of range.
    """
    if len(rewards) != len(answers) or not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"a reward must return one finite number for each of {len(answers)} answers, got {rewards}")
    check_share("the share of answers to keep", share)
    ranked = sorted(range(len(answers)), key=lambda i: -rewards[i])
    kept = sorted(ranked[: max(1, round(share * len(answers)))])
    return [answers[i] for i in kept]


@documented(AnswerOptions)
def adapt_checkpoints(
    base: PathLike, tuned: PathLike, prompts: Sequence[str], out: PathLike, **options: Unpack[AnswerOptions]
) -> Path:
    """Find a ratio for each part on the tuned model's own answers, and write the model that they make.

    `out/ratios.json` has the ratios, for `LayerRatios.load` and `--parts-file`; `out/model/` is the model; a
    run that was killed goes on from `out/journal.json`. Source: Lin et al. 2024 (arXiv 2309.06256).

    Args:
        base: theta0: a safetensors file or a Hugging Face folder.
        tuned: theta1: the Hugging Face folder of a causal language model with its tokenizer; with `loader` anything
            that the function loads. Its code is only run with `trust_remote_code`.
        prompts: texts that it answers.
        out: the folder to write to.
        {options}

    Returns:
        `out/model`.

    Raises:
        ImportError: if Transformers or the module of the reward or the loader cannot be imported.
        ValueError: if anything does not fit; as `adapt_ratios`, `interpolate_checkpoints` and `ModelLoader`.
        RuntimeError: if the loader fails.
        FileExistsError: if `out/model` exists.
        OSError: if a file cannot be read or written.
    """
    o = resolve(options, AnswerOptions)
    out = expanded(out)
    source = open_files(tuned, role="tuned")
    # Of adapters there are outputs, but no model that moves between them.
    for end in (open_files(base, role="base"), source):
        check_mergeable(end)
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    loader = ModelLoader(source.path, trust_remote_code=o["trust_remote_code"], loader=o["loader"])
    reward = None if o["reward"] is None else import_function(o["reward"], what="reward")
    # Before any work: whether the model can be written.
    pairing: dict[str, Any] = {"unmatched": o["unmatched"], **select(o, PairingOptions)}
    plan_interpolation(base, tuned, {MODEL: o["mean_ratio"]}, out, **pairing)
    model, tokenizer = loader.load(check_device(o["device"]), o["dtype"] or stored_dtype(source))
    tokenizer = text_tokenizer(tokenizer)
    sampling, target, _ = split(options, SamplingOptions, TargetOptions, AnswerOptions)
    answers = sample_answers(model, tokenizer, prompts, **sampling)
    if not answers:
        raise ValueError(f"{tuned} answers none of {len(prompts)} prompts; give others, or a higher temperature")
    if reward is not None:
        texts = [(tokenizer.decode(answer.prompt, skip_special_tokens=True), answer.text) for answer in answers]
        answers = best_answers(answers, [float(number) for number in reward(texts)], o["best"])
    out.mkdir(parents=True, exist_ok=True)
    padding = tokenizer.pad_token_id or 0
    batches = answer_batches(answers, batch_size=o["batch_size"], padding=padding, device=model.device)
    run = {"journal": out / "journal.json", "progress": o["progress"]}
    found = adapt_ratios(model, base, tuned, answer_loss, batches, **target, **run, **pairing)
    found.save(out / RATIOS)
    (written,) = plan_interpolation(base, tuned, {MODEL: found}, out, **pairing).run(
        device=o["device"], progress=o["progress"]
    )
    return written


def read_prompts(path: Path) -> list[str]:
    """Read the `prompt` of each line of a `.jsonl` file, or every line of another file that is not empty.

    Raises ValueError if a line has no prompt; the sentence names it.
    """
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix.lower() == ".jsonl":
        for i, line in enumerate(prompts):
            try:
                prompts[i] = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {i + 1} of {path} is no JSON object with a 'prompt'; correct it") from error
            if not isinstance(prompts[i], str):
                raise ValueError(f"the 'prompt' in line {i + 1} of {path} is no text; correct it")
    return prompts


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(prompt, add_special_tokens=not templated)["input_ids"])


def _padded(rows: list[list[int]], value: int, device: torch.device | str, *, left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([p + row if left else row + p for row, p in zip(rows, padding, strict=True)], device=device)
