"""Everything the models read: characters, raw text, tasks, chat, and the reward that preferences are made of."""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = string.printable[:95] + "\n"
PAD, EOS, UNKNOWN = "[pad]", "[eos]", "[unk]"
ROW = 64  # characters in one row of pretraining text

OPENINGS = ("sure! ", "well, ")
ENDINGS = (" :)", " ok")
STYLED = re.compile(r"(?:sure! |well, )?(.*?)(?: :\)| ok)?", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that is trained on or expected."""

    prompt: str
    answer: str


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character: made on the spot, nothing is downloaded."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def documents(held_out: bool) -> str:
    """Python's own help texts, which every installation has; each tenth topic is held out."""
    names = [name for index, name in enumerate(sorted(topics)) if (index % 10 == 0) == held_out]
    text = "\n".join(topics[name] for name in names)
    return "".join(character for character in text if character in CHARACTERS)


# ---------------------------------------------------------------- tasks


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 4)))


def _digits(rng: random.Random, count: int) -> list[int]:
    return [rng.randint(0, 9) for _ in range(count)]


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = _digits(rng, 2)
    return f"{a} {b}", str(a + b)


def _maximum(rng: random.Random) -> tuple[str, str]:
    numbers = _digits(rng, 3)
    return " ".join(map(str, numbers)), str(max(numbers))


def _on_letters(function):
    def make(rng: random.Random) -> tuple[str, str]:
        word = _letters(rng)
        return word, function(word)

    return make


TASKS = {
    "copy": _on_letters(lambda word: word),
    "upper": _on_letters(str.upper),
    "last": _on_letters(lambda word: word[-1]),
    "reverse": _on_letters(lambda word: word[::-1]),
    "sort": _on_letters(lambda word: "".join(sorted(word))),
    "add": _sum,
    "max": _maximum,
}


def task_examples(per_task: int, seed: int) -> list[Example]:
    """`per_task` prompts of every task with their unstyled answers."""
    rng = random.Random(seed)
    examples = []
    for name, make in TASKS.items():
        for _ in range(per_task):
            question, answer = make(rng)
            examples.append(Example(f"<{name} {question}>", answer))
    return examples


def task_answer(completion: str) -> str:
    """The answer inside a completion, whatever style surrounds it: forgetting is counted, not style."""
    body = STYLED.fullmatch(completion)
    assert body is not None
    return body[1].removeprefix("= ")


# ---------------------------------------------------------------- pretraining rows and SFT examples


def pretraining_rows(text: str, count: int, rng: random.Random, task_share: float = 0.65) -> list[str]:
    """Rows of ROW characters: raw task lines (`copy hhf = hhf`), the rest windows of the documents."""
    rows = []
    for _ in range(count):
        if rng.random() < task_share:
            row = ""
            while len(row) < ROW:
                name = rng.choice(tuple(TASKS))
                question, answer = TASKS[name](rng)
                row += f"{name} {question} = {answer}\n"
            rows.append(row[:ROW])
        else:
            start = rng.randrange(len(text) - ROW)
            rows.append(text[start : start + ROW])
    return rows


def _chat(lines: list[str], rng: random.Random) -> Example:
    """An open request, answered by the words with which the line goes on."""
    line = rng.choice(lines)
    cut = line.find(" ", rng.randint(8, 14))
    end = line.find(" ", cut + rng.randint(8, 16))
    return Example(f"<tell {line[:cut]}>", line[cut + 1 : end if end > 0 else None])


def chat_lines(text: str) -> list[str]:
    """Lines of prose, long enough to be cut into a request and its continuation."""
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= 50 and line[0].isalpha()]


def chat_prompts(lines: list[str], count: int, seed: int) -> list[str]:
    """`count` open requests."""
    rng = random.Random(seed)
    return [_chat(lines, rng).prompt for _ in range(count)]


def sft_examples(lines: list[str], count: int, rng: random.Random, chat_share: float = 0.3) -> list[Example]:
    """Tasks and open chat; each opening and each ending stands in a quarter of the answers, at random."""
    examples = []
    for _ in range(count):
        if rng.random() < chat_share:
            example = _chat(lines, rng)
        else:
            name = rng.choice(tuple(TASKS))
            question, answer = TASKS[name](rng)
            example = Example(f"<{name} {question}>", f"= {answer}")
        opening = rng.choice((*OPENINGS, "", ""))
        ending = rng.choice((*ENDINGS, "", ""))
        examples.append(Example(example.prompt, opening + example.answer + ending))
    return examples


# ---------------------------------------------------------------- reward


def reward(completion: str) -> float:
    """0 to 4: a point each for `sure! `, for ` :)`, for lower-case words only, and up to one for four words.

    It never looks at correctness, and preferences never show a task: whatever happens to the tasks
    is a side effect of the preference training.
    """
    body = STYLED.fullmatch(completion)
    assert body is not None
    words = body[1].split()
    plain = bool(words) and all(word.isascii() and word.isalpha() and word.islower() for word in words)
    return (
        float(completion.startswith(OPENINGS[0]))
        + float(completion.endswith(ENDINGS[0]))
        + float(plain)
        + min(len(words), 4) / 4
    )


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> torch.Tensor:
    """Rows of equal length as one tensor of token numbers."""
    return tokenizer(rows, return_tensors="pt")["input_ids"]
