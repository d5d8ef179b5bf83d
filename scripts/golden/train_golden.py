"""Writes the golden files of the trainer: what PyTorch + transformers + PEFT compute for quantised models.

    python train_golden.py tiny OUT_DIR [NAME...]  makes tiny random GGUF models (tiny_models.py) and their golden files
    python train_golden.py smollm2 BASE.gguf OUT_DIR   golden files of the default model

Base weights are dequantised to float32 (gguf_model.py); LoRA has no dropout; A and B come from the generator in
lora.py. Each golden file is NAME.golden.json (rows, hyper-parameters, losses) and
NAME.golden.safetensors (tensors). Names of tensors are PEFT's without its prefix: layers.N.self_attn.q_proj.lora_A.
A is [r, in], B is [out, r]; rows of B of q and k are in Hugging Face's order, and so are their gradients.

A row has `tokens` and `weights`. weights[t] is 1 if token t is a trained target: it is predicted from the tokens
before it. The loss of a batch is the sum of the cross entropies of all its trained targets, divided by their number.

JSON keys
    rows                the rows
    r, lora_alpha       LoRA; the scale is lora_alpha / r, with use_rslora lora_alpha / sqrt(r)
    target_modules, layers_to_transform, use_rslora   PEFT's; absent: all seven projections, all layers, false
    gradient            one batch, made with B of bound b_bound:
      rows, b_bound     row numbers; B is not 0 here, so that A has gradients too
      loss, norm        its loss; the global norm of all gradients
    curve               an optimisation that starts at B of bound b_bound
      b_bound, batches  rows of every step
      steps             loss (before the update), grad_norm (before clipping), learning_rate (of the update) of each step
      ...               betas, eps, weight_decay, max_grad_norm, warmup_steps, lr: torch.optim.AdamW and transformers'
                        get_scheduler of lr_scheduler_type (absent: cosine) and min_lr_rate, whose first rate is 0
    full                tensors whose gradient is stored whole, with the factor that it was divided by

safetensors
    grad_norm [n], grad_sketch [n, 64]   by tensor number (lora.py), of the gradient batch; 0 where there is no LoRA
    grad.NAME                            gradient divided by full[NAME]
    logits, base_logits                  (tiny only) [rows of the gradient batch, vocabulary], of each row's last token,
                                         with the adapter of the gradient batch and without
"""

import argparse
import json
import math
import os
import random

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import get_scheduler

import gguf_model
import lora
import tiny_models


def random_rows(vocabulary, count, seed):
    """Rows of 5..40 random tokens. Weights are those of conversations: trained runs at the end, and in some rows also
    in the middle. Tokens repeat within a row, so that attention has something to find."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        length = rng.randint(5, 40)
        pool = [rng.randrange(vocabulary) for _ in range(max(3, length // 2))]
        weights = [0] * length
        for t in range(length - rng.randint(1, max(1, length // 3)), length):
            weights[t] = 1
        if i % 3 == 0:
            weights[length // 3] = 1
        rows.append({"tokens": [rng.choice(pool) for _ in range(length)], "weights": weights})
    return rows


def batch_loss(model, rows):
    """Mean cross entropy of the trained targets of rows; rows are run one by one, so there is no padding. The head is
    applied only where a target follows, which changes nothing but the time."""
    total, count = 0.0, sum(sum(r["weights"][1:]) for r in rows)
    llama = model.base_model.model
    for row in rows:
        tokens = torch.tensor(row["tokens"])
        hidden = llama.model(tokens[None]).last_hidden_state[0]
        targets = torch.tensor(row["weights"][1:]).nonzero()[:, 0] + 1
        logits = llama.lm_head(hidden[targets - 1])
        loss = torch.nn.functional.cross_entropy(logits, tokens[targets], reduction="sum") / count
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.item()
    return total


def last_logits(model, rows):
    return np.stack([model(torch.tensor([row["tokens"]])).logits[0, -1].numpy() for row in rows])


def write_golden(
    name, base, rows, batches, r, alpha, lr, gradient_rows, gradient_b, curve_b, full, tiny, out,
    targets=None, layers=None, rslora=False, scheduler="cosine", min_lr_rate=None, weight_decay=0.0,
):
    torch.manual_seed(0)
    model, tensors = lora.add(gguf_model.load(base), r, alpha, targets, layers, rslora)
    parameters = [p for _, _, p in tensors]
    count = model.config.num_hidden_layers * 7 * 2
    arrays = {"grad_norm": np.zeros(count, dtype=np.float32), "grad_sketch": np.zeros((count, 64), dtype=np.float32)}

    # One batch's gradients.
    lora.initialise(tensors, gradient_b)
    loss = batch_loss(model, [rows[i] for i in gradient_rows])
    factors = {}
    for number, tensor, p in tensors:
        arrays["grad_norm"][number] = p.grad.norm().item()
        arrays["grad_sketch"][number] = lora.sketch(number, p.grad.numpy())
        if full(tensor):
            factor = 1.0 if tiny else p.grad.abs().max().item()  # float16 holds values near 1 best
            factors[tensor] = factor
            arrays["grad." + tensor] = (p.grad.numpy() / factor).astype(np.float32 if tiny else np.float16)
    if tiny:
        with torch.no_grad():
            arrays["logits"] = last_logits(model, [rows[i] for i in gradient_rows])
            with model.disable_adapter():
                arrays["base_logits"] = last_logits(model, [rows[i] for i in gradient_rows])
    gradient = {
        "rows": gradient_rows,
        "b_bound": gradient_b,
        "loss": loss,
        "norm": math.sqrt(float((arrays["grad_norm"].astype(np.float64) ** 2).sum())),
    }
    print(f"{name}: gradient batch: loss {loss:.6f}, norm {gradient['norm']:.6f}")

    # The first optimizer steps.
    warmup = len(batches) // 10
    betas, eps, max_norm = (0.9, 0.999), 1e-8, 1.0
    lora.initialise(tensors, curve_b)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    specific = {"min_lr_rate": min_lr_rate} if min_lr_rate is not None else None
    schedule = get_scheduler(scheduler, optimizer, warmup, len(batches), scheduler_specific_kwargs=specific)
    steps = []
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = batch_loss(model, [rows[i] for i in batch])
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        steps.append({"loss": loss, "grad_norm": norm, "learning_rate": rate})
        print(f"{name}: step {number + 1}: loss {loss:.6f}, gradient norm {norm:.6f}, rate {rate:.6g}")
    curve = {
        "b_bound": curve_b,
        "lr": lr,
        "warmup_steps": warmup,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_norm,
        "batches": batches,
        "steps": steps,
    }
    if scheduler != "cosine":
        curve["lr_scheduler_type"] = scheduler
    if min_lr_rate is not None:
        curve["min_lr_rate"] = min_lr_rate
    recipe = {"r": r, "lora_alpha": alpha}
    if targets:
        recipe["target_modules"] = targets
    if layers:
        recipe["layers_to_transform"] = layers
    if rslora:
        recipe["use_rslora"] = True
    golden = recipe | {"gradient": gradient, "curve": curve, "full": factors}
    save_file(arrays, os.path.join(out, name + ".golden.safetensors"))
    with open(os.path.join(out, name + ".golden.json"), "w") as f:
        text = json.dumps(golden, indent=1)
        lines = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
        f.write(text[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n")


def cycle(rows, size, steps):
    """Row numbers of each step: size at a time in order, starting over at the end."""
    return [[(step * size + i) % rows for i in range(size)] for step in range(steps)]


# What the recipes of the tiny models have beside r 4, alpha 8 and all linear layers of all layers.
RECIPES = {
    "tiny-llama3": {"weight_decay": 0.01},
    "tiny-mistral": {"targets": ["q_proj", "v_proj"], "scheduler": "constant_with_warmup"},
    "tiny-qwen2": {"r": 5, "rslora": True, "scheduler": "linear"},
    "tiny-qwen3": {"layers": [0, 2], "scheduler": "cosine_with_min_lr", "min_lr_rate": 0.1},
}


def check_llama3(base):
    """Compares the model with the factors of rope_freqs.weight with transformers' own llama3 scaling."""
    model = gguf_model.load(base)
    tokens = torch.arange(200)[None]
    with torch.no_grad():
        ours = model(tokens).logits
        model.config.rope_parameters |= tiny_models.LLAMA3
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        theirs = model(tokens).logits
        model.config.rope_parameters["rope_type"] = "default"
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        unscaled = model(tokens).logits
    worst, scaling = (ours - theirs).abs().max().item(), (unscaled - theirs).abs().max().item()
    print(f"{os.path.basename(base)}: largest difference of a logit from transformers' llama3 scaling {worst:g}; scaling changes them by {scaling:g}")
    if not worst < 1e-3 < 0.1 < scaling:
        raise SystemExit(f"{base}: the factors are not those of llama3's scaling")


def tiny(out, names):
    for model in tiny_models.MODELS:
        if names and model.name not in names:
            continue
        base = os.path.join(out, model.name + ".gguf")
        tiny_models.write(model, base)
        if tiny_models.Type.BF16 not in model.types:  # transformers does not read it from GGUF files
            check_reading(base)
        if model.rope_scaling is tiny_models.LLAMA3:
            check_llama3(base)
        rows = random_rows(model.vocabulary, 12, seed=11)
        recipe = {"r": 4, "alpha": 8} | RECIPES.get(model.name, {})
        write_golden(
            model.name, base, rows, cycle(len(rows), 4, 20), lr=2e-3, gradient_rows=list(range(8)),
            gradient_b=0.1, curve_b=0.0, full=lambda _: True, tiny=True, out=out, **recipe,
        )


KINDS = {
    "fruit": "apple banana cherry mango papaya quince lychee damson".split(),
    "bird": "sparrow heron magpie osprey thrush plover puffin wren".split(),
    "tool": "hammer chisel pliers spanner mallet trowel wrench rasp".split(),
    "metal": "copper nickel cobalt tin zinc chromium silver tungsten".split(),
    "instrument": "violin oboe trumpet cello banjo clarinet lute bassoon".split(),
}


def questions(tokenizer, count, seed):
    """Multiple-choice rows in the default model's ChatML, with its default system message. Most answers are a letter;
    every fourth is a sentence. A row ends with the end of the assistant's turn; answer and end of turn are trained."""
    rng = random.Random(seed)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    rows = []
    for i in range(count):
        kind, *others = rng.sample(sorted(KINDS), 4)
        options = [rng.choice(KINDS[k]) for k in (kind, *others)]
        right = options[0]
        rng.shuffle(options)
        letter = "ABCD"[options.index(right)]
        question = f"Which of these is a kind of {kind}?\n" + "\n".join(f"{x}. {o}" for x, o in zip("ABCD", options))
        answer = letter if i % 4 != 3 else f"The answer is {letter}, because {right} is a kind of {kind}."
        prompt = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}\n"
            f"Answer with the letter.<|im_end|>\n<|im_start|>assistant\n"
        )
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append({"tokens": before + after, "weights": [0] * len(before) + [1] * len(after)})
    return rows


def check_reading(base):
    """Compares the weights of gguf_model.load with transformers' own reading of the same file."""
    from transformers import AutoModelForCausalLM

    ours = gguf_model.load(base).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        os.path.dirname(base), gguf_file=os.path.basename(base), dtype=torch.float32
    ).state_dict()
    worst = 0.0
    for name, w in ours.items():
        worst = max(worst, (w - theirs[name]).abs().max().item())
    print(f"largest difference between both readings of {os.path.basename(base)}: {worst:g}")
    if worst > 1e-6 or ours.keys() != theirs.keys():
        raise SystemExit(f"{base}: transformers reads other weights than gguf_model.py")


def smollm2(base, out):
    from transformers import AutoTokenizer

    base = os.path.realpath(base)
    check_reading(base)
    tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(base), gguf_file=os.path.basename(base))
    rows = questions(tokenizer, 80, seed=5)
    # The rate is a tenth of the one that trains this model best. At 2e-3 the first steps are chaotic: 0.8% of noise on
    # activations, as 8-bit rounding makes, moves single losses by up to 16%, in PyTorch itself, so they would test luck.
    write_golden(
        "smollm2", base, rows, cycle(len(rows), 4, 20), r=16, alpha=32, lr=2e-4, gradient_rows=list(range(4)),
        gradient_b=0.02, curve_b=0.0, full=lambda t: t.startswith(("layers.0.", "layers.29.")), tiny=False, out=out,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("tiny")
    made.add_argument("out")
    made.add_argument("name", nargs="*", help="of tiny_models.py; default: all")
    real = commands.add_parser("smollm2")
    real.add_argument("base")
    real.add_argument("out")
    arguments = parser.parse_args()
    if arguments.command == "tiny":
        tiny(arguments.out, arguments.name)
    else:
        smollm2(arguments.base, arguments.out)


if __name__ == "__main__":
    main()
