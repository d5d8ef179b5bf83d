"""LoRA training with PEFT on the CPU, for train.py: a process that trains one epoch whenever it is told to.

    python peer.py MODEL.gguf ROWS.jsonl TYPE RANK ALPHA MODULES

TYPE is bf16 or fp32, the type of the frozen weights, which are those of the GGUF file, dequantised; MODULES is q_proj,v_proj or
the like, or all-linear. The first line of standard output is {"ready": true, "tokens": N, ...}. Each line of standard input is then
a setting, as {"layout": "sorted", "batch": 8, "accumulate": 1, "dropout": 0, "loss": "all", "rows": 64, "seed": 1}, answered with
{"seconds", "tokens", "rows", "computed", "peak_bytes", "loss"}: the time of one epoch over the first so many rows, of which
tokens are the rows' own and computed counts padding too. Nothing is computed while it waits.

    layout   sorted    batches of rows of similar length, padded to the longest of the batch
             shuffled  batches in random order, padded alike
             padded    random order, every row padded to 256 tokens
    loss     all       every token but a row's first
             answers   the assistant's tokens: labels of -100 elsewhere, as a user of PEFT does it; the head runs everywhere
             head      the same, with the head on the positions of the answers alone: a training loop written for it
"""

import json
import os
import random
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden"))
import gguf_model  # noqa: E402

PADDED = 256  # tokens, of the layout "padded"


def read_rows(tokenizer, path):
    """Chat rows as (tokens, first trained token), ending with the token that ends the answer."""
    rows = []
    with open(path) as f:
        for line in f:
            messages = json.loads(line)["messages"]
            tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
            if tokens[: len(prompt)] != prompt:
                raise SystemExit(f"{path}: a row does not begin with its prompt")
            while tokens[-1] != tokenizer.eos_token_id:  # the template's line break after the answer
                tokens.pop()
            rows.append((tokens, len(prompt)))
    return rows


def padded_batch(rows, width, loss, filler):
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for k, (tokens, start) in enumerate(rows):
        n = len(tokens)
        ids[k, :n] = torch.tensor(tokens)
        mask[k, :n] = 1
        first = 0 if loss == "all" else start
        labels[k, first:n] = ids[k, first:n]
    return ids, mask, labels


def micro_batches(rows, setting):
    """One epoch, as a list of optimizer steps, each a list of lists of rows."""
    order = list(range(len(rows)))
    shuffle = random.Random(setting["seed"]).shuffle
    size, accumulate = setting["batch"], setting["accumulate"]
    if setting["layout"] == "sorted":
        order.sort(key=lambda i: len(rows[i][0]))
    else:
        shuffle(order)
    batches = [[rows[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
    if setting["layout"] == "sorted":
        shuffle(batches)
    return [batches[k : k + accumulate] for k in range(0, len(batches), accumulate)]


class Trainer:
    def __init__(self, model, rows, filler):
        self.model, self.rows, self.filler = model, rows, filler
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, weight_decay=0)

    def set_dropout(self, share):
        for module in self.model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(share) if share else torch.nn.Identity()

    def loss(self, ids, mask, labels, objective):
        if objective != "head":
            return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        base = self.model.base_model.model
        hidden = base.model(input_ids=ids, attention_mask=mask)[0][:, :-1]
        wanted = labels[:, 1:] != -100
        return torch.nn.functional.cross_entropy(base.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted])

    def epoch(self, setting):
        self.set_dropout(setting["dropout"])
        rows = self.rows[: setting["rows"]]
        steps = micro_batches(rows, setting)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # VmHWM starts again
        computed, total = 0, 0.0
        began = time.perf_counter()
        for step in steps:
            for batch in step:
                width = PADDED if setting["layout"] == "padded" else max(len(tokens) for tokens, _ in batch)
                computed += width * len(batch)
                loss = self.loss(*padded_batch(batch, width, setting["loss"], self.filler), setting["loss"]) / len(step)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {
            "seconds": time.perf_counter() - began,
            "rows": len(rows),
            "tokens": sum(len(tokens) for tokens, _ in rows),
            "computed": computed,
            "peak_bytes": peak_bytes(),
            "loss": total / len(steps),
        }


def peak_bytes():
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main():
    if len(sys.argv) != 7:
        raise SystemExit(__doc__)
    path, rows_path, kind, rank, alpha, modules = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(os.path.abspath(path)), gguf_file=os.path.basename(path))
    rows = read_rows(tokenizer, rows_path)
    model = gguf_model.load(path).to({"bf16": torch.bfloat16, "fp32": torch.float32}[kind])
    model.set_attn_implementation("sdpa")
    model.config.use_cache = False
    targets = modules if modules == "all-linear" else modules.split(",")
    model = get_peft_model(model, LoraConfig(r=int(rank), lora_alpha=float(alpha), target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    trainer = Trainer(model, rows, tokenizer.eos_token_id)
    print(json.dumps({"ready": True, "rows": len(rows), "tokens": sum(len(t) for t, _ in rows), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(trainer.epoch(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
