"""Uses a running server with the official openai package, as its users do: chat, streaming, a constrained answer,
errors, an upload, a fine-tuning job to its end, the tuned model. Exits with 1 at the first answer that is not as expected.

    python openai_client.py http://127.0.0.1:8080/v1
"""

import json
import math
import os
import pathlib
import signal
import sys
import time
import urllib.request

import openai

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "Which is a fruit?\nA. hammer\nB. apple\nC. copper\nD. violin\nAnswer with the letter."


def expect(what, holds, got=""):
    if not holds:
        raise SystemExit(f"FAIL {what}: {got}")
    print(f"ok   {what}")


PAIR = (
    '{"input": {"messages": [{"role": "user", "content": "Which is a fruit?"}]}, '
    '"preferred_output": [{"role": "assistant", "content": "The apple."}], '
    '"non_preferred_output": [{"role": "assistant", "content": "The hammer."}]}\n'
)


def stream_that_breaks(client):
    """Ends the model's process in the middle of a stream, which the client raises as an error, and asks again."""
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Write a long story about a river."}], temperature=0, stream=True
    )
    text = ""
    try:
        for chunk in stream:
            content = chunk.choices[0].delta.content
            if content and not text:
                health = json.load(urllib.request.urlopen(str(client.base_url.join("/health"))))
                os.kill(next(m["pid"] for m in health["models"] if m["model"] == MODEL), signal.SIGKILL)
            text += content or ""
        expect("stream that breaks: raises", False, f"it ended after {text!r}")
    except openai.APIError as e:
        expect("stream that breaks: raises, with the reason", text and e.code == "runner_ended", repr(e))
    again = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Say hello."}], max_tokens=8)
    expect("stream that breaks: the next request is answered", again.choices[0].message.content)


def main():
    client = openai.OpenAI(base_url=sys.argv[1], api_key="any", max_retries=0, timeout=120)
    messages = [{"role": "user", "content": "Say hello."}]

    expect("models: the base model is listed", MODEL in [m.id for m in client.models.list()])
    expect("models: and found by name", client.models.retrieve(MODEL).id == MODEL)

    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    text = chat.choices[0].message.content
    expect("chat: text and a reason to finish", text and chat.choices[0].finish_reason in ("stop", "length"), chat)

    streamed, usage, reasons = "", None, []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    expect("stream: same text as without", streamed == text, f"{streamed!r}, expected {text!r}")
    same = usage is not None and usage.total_tokens == chat.usage.total_tokens
    expect("stream: usage and one reason to finish", same and len(reasons) == 1, f"{usage} {reasons}")

    choice = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], logprobs=True, top_logprobs=4,
        extra_body={"guided_choice": ["A", "B", "C", "D"]},
    ).choices[0]
    expect("guided_choice: one of the four", choice.message.content in list("ABCD"), choice)
    total = sum(math.exp(t.logprob) for t in choice.logprobs.content[0].top_logprobs)
    expect("guided_choice: probabilities sum to 1", abs(total - 1) < 1e-3, total)

    try:
        client.chat.completions.create(model="no-such-model", messages=messages)
        expect("error: unknown model", False, "no error")
    except openai.NotFoundError as e:
        expect("error: unknown model", e.code == "model_not_found", e)
    try:
        client.chat.completions.create(model=MODEL, messages=messages, extra_body={"guided_regex_typo": "x"})
        expect("error: unknown field", False, "no error")
    except openai.BadRequestError as e:
        expect("error: unknown field is named", "guided_regex_typo" in str(e), e)

    stream_that_breaks(client)

    training = pathlib.Path(__file__).with_name("train.jsonl")
    file = client.files.create(file=training, purpose="fine-tune")
    file = client.files.wait_for_processing(file.id)
    expect("upload: processed", file.status == "processed" and file.bytes == training.stat().st_size, file)
    expect("upload: the content comes back", client.files.content(file.id).read() == training.read_bytes())
    expect("upload: is listed", file.id in [f.id for f in client.files.list()])

    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=file.id, suffix="python", seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
        extra_body={"hone": {"r": 4}},
    )
    expect("job: created", job.object == "fine_tuning.job" and job.error is None, job)
    deadline = time.monotonic() + 180
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    expect("job: succeeded", job.status == "succeeded", [e.message for e in events])
    expect("job: events come in pages, newest first", len(events) > 5 and events[0].created_at >= events[-1].created_at, events)
    expect("job: metrics of every step", any(e.type == "metrics" and "train_loss" in e.data for e in events), events)
    expect("job: hyper-parameters", job.method.supervised.hyperparameters.n_epochs == 1 and job.trained_tokens > 0, job)
    expect("job: is listed", job.id in [j.id for j in client.fine_tuning.jobs.list()])

    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": QUESTION}],
        extra_body={"guided_choice": ["A", "B", "C", "D"]},
    )
    expect("tuned model: answers", answer.choices[0].message.content in list("ABCD"), answer)
    expect("tuned model: is listed", job.fine_tuned_model in [m.id for m in client.models.list()])

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    expect("job: checkpoints are models", all(c.fine_tuned_model_checkpoint in [m.id for m in client.models.list()] for c in checkpoints), checkpoints)

    pairs = client.files.create(file=("pairs.jsonl", PAIR.encode()), purpose="fine-tune")
    preference = client.fine_tuning.jobs.create(
        model=job.fine_tuned_model, training_file=pairs.id, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}},
    )
    expect("dpo: created", preference.method.dpo.hyperparameters.beta == 0.2 and preference.method.dpo.hyperparameters.n_epochs == "auto", preference)
    client.fine_tuning.jobs.cancel(preference.id)

    second = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, extra_body={"hone": {"num_train_epochs": 50}})
    client.fine_tuning.jobs.cancel(second.id)
    deadline = time.monotonic() + 10
    while (status := client.fine_tuning.jobs.retrieve(second.id).status) != "cancelled" and time.monotonic() < deadline:
        time.sleep(0.1)
    expect("job: is cancelled", status == "cancelled", status)


if __name__ == "__main__":
    main()
