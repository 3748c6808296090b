"""Tasks for the lm-evaluation-harness in YAML files, on questions in the words of `word_tokens`."""

from __future__ import annotations

import json
from pathlib import Path

MULTIPLE_CHOICE = """
task: {name}
tag: {tag}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
{more}
"""
PERPLEXITY = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity, higher_is_better: false}}]
metadata: {{version: 1}}
"""
GROUP = """
group: {name}
task: [{members}]
aggregate_metric_list: [{{metric: {metric}, weight_by_size: false}}]
metadata: {{version: 1}}
"""


def write_tasks(folder: Path) -> Path:
    """Write the tasks `first` and `second` of the tag `words`, `perplexity`, and groups of them; return the folder.

    `all` holds `choices`, which holds `first` and `second`; `losses` holds `inner`, which holds `perplexity`.
    """
    folder.mkdir()
    data = folder / "questions.jsonl"
    questions = [
        {"question": f"w{3 + i} w{7 + i}", "choices": [f"w{20 + i}", f"w{30 + i}", f"w{40 - i}"], "answer": i % 3}
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, more in (("first", ""), ("second", "num_fewshot: 2")):
        text = MULTIPLE_CHOICE.format(name=name, data=data, tag="words", more=more)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "perplexity.yaml").write_text(PERPLEXITY.format(name="word_loss", data=data))
    groups = (("choices", "first, second", "acc"), ("all", "choices", "acc"))
    groups += (("inner", "word_loss", "word_perplexity"), ("losses", "inner", "word_perplexity"))
    for name, members, metric in groups:
        (folder / f"group_{name}.yaml").write_text(GROUP.format(name=name, members=members, metric=metric))
    return folder
