"""transformers answering multiple-choice questions, for serving.py.

    python generate.py MODEL.gguf

Prints "ready"; then, for each line [first, count, batch] of standard input, the seconds that so many questions take: greedy,
at most 10 new tokens (the model stops after one or two), each prompt computed whole, as generate does.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import serving

torch.set_num_threads(os.cpu_count())
path = os.path.abspath(sys.argv[1])
directory, file = os.path.split(path)
tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.bfloat16).eval()
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
print("ready", flush=True)
for line in sys.stdin:
    first, count, batch = json.loads(line)
    began = time.perf_counter()
    for i in range(first, first + count, batch):
        texts = [
            "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in serving.question(k)) + "<|im_start|>assistant\n"
            for k in range(i, min(i + batch, first + count))
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=10, do_sample=False)
    print(json.dumps(time.perf_counter() - began), flush=True)
