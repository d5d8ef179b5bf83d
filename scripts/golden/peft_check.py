"""Asks PEFT what an exported adapter computes: the other side of `make test-peft`.

    python peft_check.py BASE.gguf ADAPTER_DIR TOKENS.json LOGITS.f32

ADAPTER_DIR is what hone writes beside adapter.gguf (adapter_config.json, adapter_model.safetensors). PEFT loads it
onto the base model, dequantised to float32, with no help from this script: names, orders and scale are as in the files.
TOKENS.json is a list of rows, each a list of token ids. LOGITS.f32 gets the logits of every position of every row, one
row after the other, as little-endian float32: (sum of row lengths) x (vocabulary size) numbers. One JSON line on
standard output says {"rows", "positions", "vocabulary", "r", "lora_alpha", "tensors"}.
"""

import json
import sys
import warnings

import torch
from peft import PeftModel

import gguf_model


def main():
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    base, directory, tokens, out = sys.argv[1:]
    # A tensor that the directory lacks would keep PEFT's own initialisation, and PEFT only warns.
    warnings.filterwarnings("error", message="Found missing adapter keys")
    model = PeftModel.from_pretrained(gguf_model.load(base), directory).float().eval()
    config = model.peft_config["default"]
    with open(tokens) as f:
        rows = json.load(f)
    positions = vocabulary = 0
    with open(out, "wb") as f, torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row])).logits[0]
            f.write(logits.numpy().astype("<f4").tobytes())
            positions, vocabulary = positions + logits.shape[0], logits.shape[1]
    print(
        json.dumps(
            {
                "rows": len(rows),
                "positions": positions,
                "vocabulary": vocabulary,
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "tensors": sum("lora_" in name for name, _ in model.named_parameters()),
            }
        )
    )


if __name__ == "__main__":
    main()
