#!/usr/bin/env python3
"""Makes a tokenizer.json from the default model's GGUF through transformers, for the test that compares the tokenizers.

    python3 scripts/golden/tokenizer_json.py MODEL.gguf [OUT.json.gz]      (needs transformers, gguf and torch)

OUT is internal/prompt/testdata/tokenizer.json.gz unless given.

transformers does not know the pre-tokenizer that the GGUF names (tokenizer.ggml.pre = smollm) and takes GPT-2's.
SmolLM2 splits digits one by one before that; the script puts this step back, as in the model's own tokenizer.json.
"""
import gzip
import json
import pathlib
import sys
import tempfile

from transformers import AutoTokenizer

model = pathlib.Path(sys.argv[1])
out = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else (
    pathlib.Path(__file__).resolve().parents[2] / "internal" / "prompt" / "testdata" / "tokenizer.json.gz")

tokenizer = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
with tempfile.TemporaryDirectory() as directory:
    tokenizer.save_pretrained(directory)
    data = json.loads((pathlib.Path(directory) / "tokenizer.json").read_text(encoding="utf-8"))

print("pre-tokenizer from transformers:", json.dumps(data["pre_tokenizer"]))
print("normalizer from transformers:", json.dumps(data["normalizer"]))
print("post-processor from transformers:", json.dumps(data["post_processor"]))
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
if data["pre_tokenizer"] != byte_level:
    sys.exit("transformers reads the pre-tokenizer differently than this script expects; compare it with the model's own tokenizer.json")
data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
print("added tokens:", len(data["added_tokens"]))
out.write_bytes(gzip.compress(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8"), 9, mtime=0))
print(f"{out}: {out.stat().st_size} bytes")
