"""Real data: preference datasets, tasks, and prompts as every trainer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from data import Example
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from worlds import Batch

from fused_merge.adapt.answers import Answer, answer_batches

# For conversations where the tokenizer has no template of its own: words that any tokenizer has.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}:\n{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)

Row = dict[str, Any]  # prompt, chosen and rejected as strings; messages: the prompt as a conversation, or None


def read_dataset(name: str, columns: Sequence[str]) -> Dataset:
    """Read a folder, a .json file or NAME[:SPLIT] of the Hub, and see that it has the columns."""
    path = Path(name)
    try:
        if path.is_file():
            dataset = load_dataset("json", data_files=str(path), split="train")
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = load_from_disk(name)
            dataset = found["train"] if isinstance(found, DatasetDict) else found
        else:
            repository, _, split = name.partition(":")
            dataset = load_dataset(repository, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"no dataset {name} ({error}); give a folder, a .json file or NAME[:SPLIT] of the Hub"
        ) from error
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise SystemExit(
            f"{name} has no column {missing[0]!r}, only {', '.join(map(repr, dataset.column_names))}; rename its "
            f"columns to {', '.join(columns)}"
        )
    return dataset


def preference_rows(name: str, tokenizer: Any, longest: int) -> list[Row]:
    """The rows of a preference dataset, prompts rendered; each prompt once, and none that leaves no room to answer."""
    rows: dict[str, Row] = {}
    for entry in read_dataset(name, ("chosen", "rejected")):
        chosen, rejected = entry["chosen"], entry["rejected"]
        if isinstance(chosen, list) and chosen[0]["role"] != "assistant":  # the prompt is what both begin with
            entry = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
        elif "prompt" not in entry:
            raise SystemExit(f"{name} has no column 'prompt'; rename its columns to prompt, chosen, rejected")
        messages, prompt = rendered(entry["prompt"], tokenizer)
        answers = {key: _text(entry[key]) for key in ("chosen", "rejected")}
        rows.setdefault(prompt, {"prompt": prompt, "messages": messages, **answers})
    lengths = map(len, tokenizer(list(rows))["input_ids"]) if rows else ()
    return [row for row, length in zip(rows.values(), lengths, strict=True) if length <= longest]


def task_rows(name: str, tokenizer: Any) -> list[Example]:
    """Prompts and answers: conversations through the template, strings as they are."""
    rows = read_dataset(name, ("prompt", "answer"))
    conversations = rows and isinstance(rows[0]["prompt"], list)
    return [
        Example(rendered(row["prompt"], tokenizer)[1] if conversations else row["prompt"], str(row["answer"]))
        for row in rows
    ]


def rendered(prompt: str | list[dict[str, str]], tokenizer: Any) -> tuple[list[dict[str, str]] | None, str]:
    """A prompt as a conversation and as the string that all trainers get; without template a string stays one."""
    if isinstance(prompt, str):
        if tokenizer.chat_template is None:
            return None, prompt
        prompt = [user(prompt)]
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # Where the template has written what the tokenizer adds to every text, it would stand there twice.
    if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return prompt, text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _text(answer: str | list[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else answer[0]["content"]


def pairs_of(rows: list[Row]) -> list[dict[str, str]]:
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def answered(tokenizer: Any, rows: list[Row], longest: int) -> Batch:
    """Prompts with chosen answers, labels on the answers alone."""
    lists = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["chosen"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        lists.append(Answer(prompt, answer[: longest - len(prompt)], ""))
    [batch] = answer_batches(lists, batch_size=len(lists), padding=tokenizer.pad_token_id)
    return batch
