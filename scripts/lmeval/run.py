"""Runs lm-evaluation-harness's local-completions against a running server, on the questions of examples/mcq, and compares its accuracy
with that of `hone predict`: both ask the model for the likeliest letter after the same tokens, so they must agree.

    python run.py bin/hone http://127.0.0.1:8080 examples/mcq WORK

The tokenizer is the server's own (/tokenizer_info, /tokenize): the harness needs no copy of it. Exits with 1 if the two differ.
"""

import csv
import json
import os
import re
import subprocess
import sys
import urllib.request

import lm_eval
from lm_eval.tasks import TaskManager

MODEL = "SmolLM2-135M-Instruct"
# The question template that hone predict uses when it is told none.
TEMPLATE = "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer with the letter only."
TASK = """
task: hone_mcq
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def post(base, path, body):
    request = urllib.request.Request(base + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def rendered(base, question):
    """A question as the model sees it from a chat request, with its template."""
    row = {key.strip(): value.strip() for key, value in question.items()}
    text = TEMPLATE.format(row["Question"], *(row[f"Option {letter}"] for letter in "ABCD"))
    tokens = post(base, "/tokenize", {"model": MODEL, "messages": [{"role": "user", "content": text}], "add_generation_prompt": True})["tokens"]
    return post(base, "/detokenize", {"model": MODEL, "tokens": tokens})["prompt"]


def main():
    hone, base, examples, work = sys.argv[1:]
    os.makedirs(work, exist_ok=True)
    with open(os.path.join(examples, "test.csv"), encoding="utf-8-sig") as f:
        questions = list(csv.DictReader(f))
    with open(os.path.join(examples, "test_answers.csv"), encoding="utf-8-sig") as f:
        answers = {row["ID"].strip(): row["Answer"].strip() for row in csv.DictReader(f)}
    rows = os.path.join(work, "questions.jsonl")
    with open(rows, "w") as f:
        for question in questions:
            answer = "ABCD".index(answers[question["ID"].strip()])
            f.write(json.dumps({"prompt": rendered(base, question), "answer": answer}) + "\n")
    with open(os.path.join(work, "hone_mcq.yaml"), "w") as f:
        f.write(TASK.format(file=rows))

    result = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={"model": MODEL, "base_url": base + "/v1/completions", "num_concurrent": 8, "max_length": 2048},
        tasks=["hone_mcq"],
        task_manager=TaskManager(include_path=work, include_defaults=False),
        bootstrap_iters=0,
    )
    harness = result["results"]["hone_mcq"]["acc,none"]

    out = subprocess.run(
        [hone, "predict", "--base-url", base + "/v1", "--model", MODEL, "--questions", os.path.join(examples, "test.csv"), "--answers",
         os.path.join(examples, "test_answers.csv"), "--out", os.path.join(work, "submission.csv"), "--overwrite"],
        capture_output=True, text=True, check=True,
    ).stdout
    print(out)
    right = int(re.search(r"\((\d+) of \d+\)", out)[1])
    predictor = right / len(questions)
    print(f"lm-evaluation-harness: {harness:.4f}   hone predict: {predictor:.4f}   of {len(questions)} questions")
    if abs(harness - predictor) > 1e-9:
        raise SystemExit("FAIL the two accuracies differ")


if __name__ == "__main__":
    os.environ["HF_DATASETS_OFFLINE"] = "1"  # the task's file is local
    main()
