"""Hooks of `make test-schemathesis`: they lead part of the valid requests to what is there, so that fuzzing gets beyond 404
and beyond a conversation that makes no sense. Requests that are meant to be invalid stay as they are.
"""

import functools
import json
import os
import urllib.request

import schemathesis
from schemathesis import GenerationMode

MODEL = "SmolLM2-135M-Instruct"
BASE = os.environ["base"]
# Fields that exclude each other, so that few random requests with all of them are sound.
QUARRELSOME = (
    "add_generation_prompt", "best_of", "continue_final_message", "dimensions", "grammar", "guided_choice", "guided_grammar", "guided_json",
    "guided_regex", "logit_bias", "max_completion_tokens", "min_tokens", "response_format", "stop", "stream_options", "structured_outputs",
    "tool_choice", "tools", "top_logprobs",
)


@functools.cache
def file_id():
    """Uploads a small file and returns its id."""
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    body = (
        '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        f'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{row}\r\n--x--\r\n'
    )
    request = urllib.request.Request(BASE + "/v1/files", body.encode(), {"Content-Type": "multipart/form-data; boundary=x"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["id"]


def share(value, of):
    """A number below `of` that is the same for the same value in every run."""
    return sum(repr(value).encode()) % of


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.operation.method.upper() == "DELETE" and case.path_parameters and case.path_parameters.get("id") == MODEL:
        case.path_parameters["id"] = "no-such-model"  # ids from answers are tried too, and the model is needed
    if case.meta is None or case.meta.generation.mode != GenerationMode.POSITIVE:
        return
    path, body = case.operation.path, case.body
    if isinstance(body, dict) and "model" in body and share(body, 4):
        body["model"] = MODEL
        if share(body, 3) and not path.startswith("/v1/fine_tuning"):
            for name in QUARRELSOME:
                if name in body and share((name, sorted(body)), 4):
                    del body[name]
            if body.get("messages"):
                body["messages"] = [{"role": "user", "content": str(m.get("content"))} for m in body["messages"] if isinstance(m, dict)]
    if isinstance(body, dict) and path in ("/v1/chat/completions", "/v1/completions"):
        body["max_tokens"] = min(body.get("max_tokens") or 4, 4)
        if isinstance(body.get("n"), int):
            body["n"] = max(1, min(body["n"], 8))
    if case.path_parameters and case.operation.method.upper() == "GET" and share(case.path_parameters, 2):
        if path.startswith("/v1/files/"):
            case.path_parameters["id"] = file_id()
        elif path.startswith("/v1/models/"):
            case.path_parameters["id"] = MODEL
