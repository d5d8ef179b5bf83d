"""Hooks of `make test-schemathesis`: they lead some of the requests to what is there, so that fuzzing gets beyond 404.

Half of the requests with a model name get the default model's, and answers are kept short. A file is uploaded before the
first request, and ids in paths are that file's in half of the cases; deletions keep their made-up ids.
"""

import functools
import json
import os
import urllib.request

import schemathesis

MODEL = "SmolLM2-135M-Instruct"
BASE = os.environ["base"]


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


def often(value):
    """Says yes to half of the values, to the same ones in every run."""
    return sum(map(ord, repr(value))) % 2 == 0


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and isinstance(body.get("model"), str) and often(body):
        body["model"] = MODEL
    if isinstance(body, dict) and "messages" in body or isinstance(body, dict) and "prompt" in body:
        for limit in ("max_tokens", "max_completion_tokens"):
            if type(body.get(limit)) is int and body[limit] > 4:
                body[limit] = 4
        if "max_tokens" not in body and "max_completion_tokens" not in body:
            body["max_tokens"] = 4
    return body


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    operation = context.operation
    if path_parameters and operation.method.upper() != "DELETE" and often(path_parameters):
        if operation.path.startswith("/v1/files/"):
            path_parameters["id"] = file_id()
        elif operation.path.startswith("/v1/models/"):
            path_parameters["id"] = MODEL
    return path_parameters
