"""Uses a running server with the official openai package, as its users do: chat, streaming, a constrained answer,
tools, errors, a file, a fine-tuning job to its end, a batch, the tuned model. The package validates every answer against its
own pydantic models, and strictly so. Exits with 1 at the first answer that is not as expected.

    python openai_client.py http://127.0.0.1:8080/v1
"""

import collections
import hashlib
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


class Client(openai.OpenAI):
    """A client that raises for an answer which its own models do not accept: no field may be missing or of another type."""

    def __init__(self, **options):
        super().__init__(**options, _strict_response_validation=True)

    def _process_response(self, **options):
        answer = super()._process_response(**options)
        if isinstance(answer, openai.BaseModel):
            strict(answer)
        return answer


validated = collections.Counter()


def strict(answer):
    """Validates what the server sent once more in pydantic's strict mode, which does not turn "1" into 1."""
    validated[type(answer).__name__] += 1
    type(answer).model_validate_json(answer.model_dump_json(exclude_unset=True, by_alias=True), strict=True)
    return answer


def batch(client, tuned):
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": name, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}}
        for i, name in enumerate([MODEL, tuned, "no-such-model"])
    ]
    file = client.files.create(file=("batch.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"})
    deadline = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "expired", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    expect("batch: completed, one request failed", (batch.status, counts.completed, counts.failed) == ("completed", 2, 1), batch)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    expect("batch: an answer of each model", {a["custom_id"] for a in answers} == {"r0", "r1"}, answers)
    for answer in answers:
        openai.types.chat.ChatCompletion.model_validate_json(json.dumps(answer["response"]["body"]), strict=True)
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    expect("batch: the failed request", [e["custom_id"] for e in errors] == ["r2"] and errors[0]["response"]["status_code"] == 404, errors)
    expect("batch: is listed", batch.id in [b.id for b in client.batches.list(limit=1)])


def upload(client):
    """Sends a file in two parts."""
    content = b"".join(b'{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "x"}]}\n' % i for i in range(20))
    made = client.uploads.create(filename="parts.jsonl", purpose="fine-tune", bytes=len(content), mime_type="application/jsonl")
    parts = [client.uploads.parts.create(made.id, data=part).id for part in (content[:500], content[500:])]
    done = client.uploads.complete(made.id, part_ids=parts, md5=hashlib.md5(content).hexdigest())
    expect("upload in parts: completed", done.status == "completed" and client.files.content(done.file.id).read() == content, done)
    given_up = client.uploads.create(filename="x", purpose="fine-tune", bytes=10, mime_type="text/plain")
    expect("upload in parts: is cancelled", client.uploads.cancel(given_up.id).status == "cancelled")


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
    client = Client(base_url=sys.argv[1], api_key="any", max_retries=0, timeout=120)
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
        usage = strict(chunk).usage or usage
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

    shape = {"type": "object", "properties": {"drink": {"enum": ["tea", "coffee"]}}, "required": ["drink"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Anna likes tea."}], max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": shape}},
    )
    expect("json_schema: an object of the schema", json.loads(answer.choices[0].message.content)["drink"] in ("tea", "coffee"), answer)

    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    weather = {
        "model": MODEL, "messages": [{"role": "user", "content": "What is the weather in Paris?"}], "max_tokens": 60, "temperature": 0,
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": city}}], "tool_choice": "required",
    }
    calls = client.chat.completions.create(**weather).choices[0].message.tool_calls
    expect("tools: a call", json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome"), calls)
    arguments = ""
    for chunk in client.chat.completions.create(**weather, stream=True):
        for part in strict(chunk).choices[0].delta.tool_calls or []:
            arguments += part.function.arguments if part.index == 0 else ""
    expect("tools: the same call in a stream", arguments == calls[0].function.arguments, arguments)

    vectors = client.embeddings.create(model=MODEL, input=["a cat", "the economy"], encoding_format="float")
    expect("embeddings: one vector a text", len(vectors.data) == 2 and len(vectors.data[0].embedding) > 100)
    completion = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, logprobs=2)
    expect("completion: text with log-probabilities", len(completion.choices[0].logprobs.tokens) == 4, completion)

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
    expect("upload: is listed", file.id in [f.id for f in client.files.list(limit=1)])
    upload(client)

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
    client.fine_tuning.jobs.pause(second.id)
    client.fine_tuning.jobs.resume(second.id)
    client.fine_tuning.jobs.cancel(second.id)
    deadline = time.monotonic() + 10
    while (status := client.fine_tuning.jobs.retrieve(second.id).status) != "cancelled" and time.monotonic() < deadline:
        time.sleep(0.1)
    expect("job: is cancelled", status == "cancelled", status)

    batch(client, job.fine_tuned_model)
    expect("tuned model: is deleted", client.models.delete(job.fine_tuned_model).deleted)
    expect("file: is deleted", client.files.delete(file.id).deleted)
    expect("strict: answers of all kinds were validated", len(validated) >= 15 and validated["ChatCompletionChunk"] > 5, validated)
    print("    ", dict(validated))


if __name__ == "__main__":
    main()
