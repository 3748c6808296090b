"""The demo's reward and exact match, as scorers for `fused-merge sweep`; docs/tutorial.md shows this file."""

import sys

sys.path.insert(0, "bench/alignment_tax")

import data
from evaluate import sample


def reward(model, tokenizer):
    """Mean reward, 0 to 4, of 600 answers to 300 open requests."""
    requests = 2 * data.chat_prompts(data.chat_lines(data.documents(held_out=True)), 300, seed=2)
    answers = sample(model, tokenizer, requests)
    return sum(map(data.reward, answers)) / len(answers)


def exact_match(model, tokenizer):
    """Share of 420 tasks, 60 of each of seven kinds, that are answered exactly."""
    tasks = data.task_examples(60, seed=1)
    answers = sample(model, tokenizer, [task.prompt for task in tasks], greedy=True, new_tokens=20)
    right = [data.task_answer(answer) == task.answer for answer, task in zip(answers, tasks, strict=True)]
    return sum(right) / len(right)
