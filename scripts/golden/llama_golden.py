"""Writes the golden files of the trainer: what PyTorch + transformers + PEFT compute for a quantised Llama.

    python llama_golden.py tiny OUT_DIR            makes two tiny random GGUF models and their golden files
    python llama_golden.py smollm2 BASE.gguf OUT_DIR   golden files of the default model

Base weights are dequantised to float32 (gguf_llama.py); LoRA is on all seven projections, without dropout; A and B
come from the generator in lora.py. Each golden file is NAME.golden.json (rows, hyper-parameters, losses) and
NAME.golden.safetensors (tensors). Names of tensors are PEFT's without its prefix: layers.N.self_attn.q_proj.lora_A.
A is [r, in], B is [out, r]; rows of B of q and k are in Hugging Face's order, and so are their gradients.

A row has `tokens` and `weights`. weights[t] is 1 if token t is a trained target: it is predicted from the tokens
before it. The loss of a batch is the sum of the cross entropies of all its trained targets, divided by their number.

JSON keys
    rows                the rows
    r, lora_alpha       LoRA; the scale is lora_alpha / r
    gradient            one batch, made with B of bound b_bound:
      rows, b_bound     row numbers; B is not 0 here, so that A has gradients too
      loss, norm        its loss; the global norm of all gradients
    curve               an optimisation that starts at B of bound b_bound
      b_bound, batches  rows of every step
      steps             loss (before the update), grad_norm (before clipping), learning_rate (of the update) of each step
      ...               betas, eps, weight_decay, max_grad_norm, warmup_steps, lr: torch.optim.AdamW and transformers'
                        get_cosine_schedule_with_warmup, whose first rate is 0
    full                tensors whose gradient is stored whole, with the factor that it was divided by

safetensors
    grad_norm [n], grad_sketch [n, 64]   by tensor number (lora.py), of the gradient batch
    grad.NAME                            gradient divided by full[NAME]
    init.NAME                            (tiny only) A and B of the gradient batch, to check a generator against
    logits                               (tiny only) [rows of the gradient batch, vocabulary], of each row's last token
"""

import argparse
import json
import math
import os
import random

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.numpy import save_file
from transformers import get_cosine_schedule_with_warmup

import gguf_llama
import lora

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ["t h", "th e", "i n", "a n", "e r", "o n", "r e", "a t", "e n", "o r", "e s", "i s", "an d"]


def byte_pieces():
    """GPT-2's printable stand-ins of the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    pieces, spare = [], 256
    for b in range(256):
        if b in printable:
            pieces.append(chr(b))
        else:
            pieces.append(chr(spare))
            spare += 1
    return pieces


def write_tiny(path, quant, layers, tied, seed):
    """Writes a random Llama that llama.cpp loads: 3 special tokens, the 256 bytes and a few merges; a ChatML template."""
    rng = np.random.default_rng(seed)
    hidden, ff, heads, kv_heads, head_dim = 64, 160, 4, 2, 16
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + byte_pieces() + [m.replace(" ", "") for m in MERGES]
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("tiny random llama")
    w.add_context_length(512)
    w.add_embedding_length(hidden)
    w.add_block_count(layers)
    w.add_feed_forward_length(ff)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(head_dim)
    w.add_vocab_size(len(tokens))
    w.add_file_type({gguf.GGMLQuantizationType.Q4_1: 3, gguf.GGMLQuantizationType.Q8_0: 7}[quant])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.NORMAL] * (len(tokens) - len(special)))
    w.add_token_merges(MERGES)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_add_bos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(CHATML)

    def matrix(name, rows, columns, scale, quant, permuted_heads=0):
        m = rng.normal(0, scale, (rows, columns)).astype(np.float32)
        if permuted_heads:
            m = gguf_llama.permute(m, permuted_heads)
        w.add_tensor(name, quantize(m, quant), raw_dtype=quant)

    def norm(name):
        w.add_tensor(name, (1 + 0.2 * rng.normal(0, 1, hidden)).astype(np.float32))

    matrix("token_embd.weight", len(tokens), hidden, 0.2, gguf.GGMLQuantizationType.Q8_0)
    for i in range(layers):
        norm(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", heads * head_dim, hidden, 0.2, quant, heads)
        matrix(f"blk.{i}.attn_k.weight", kv_heads * head_dim, hidden, 0.2, quant, kv_heads)
        matrix(f"blk.{i}.attn_v.weight", kv_heads * head_dim, hidden, 0.12, quant)
        matrix(f"blk.{i}.attn_output.weight", hidden, heads * head_dim, 0.12, quant)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", ff, hidden, 0.12, quant)
        matrix(f"blk.{i}.ffn_up.weight", ff, hidden, 0.12, quant)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ff, 0.12, quant)
    norm("output_norm.weight")
    if not tied:
        matrix("output.weight", len(tokens), hidden, 0.2, quant)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return len(tokens)


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


def write_golden(name, base, rows, batches, r, alpha, lr, gradient_rows, gradient_b, curve_b, full, tiny, out):
    torch.manual_seed(0)
    model, tensors = lora.add(gguf_llama.load(base), r, alpha)
    parameters = [p for _, _, p in tensors]
    arrays = {}

    # One batch's gradients.
    lora.initialise(tensors, gradient_b)
    loss = batch_loss(model, [rows[i] for i in gradient_rows])
    arrays["grad_norm"] = np.array([p.grad.norm().item() for p in parameters], dtype=np.float32)
    arrays["grad_sketch"] = np.stack([lora.sketch(n, p.grad.numpy()) for n, _, p in tensors])
    factors = {}
    for _, tensor, p in tensors:
        if tiny:
            arrays["init." + tensor] = p.detach().numpy().copy()
        if full(tensor):
            factor = 1.0 if tiny else p.grad.abs().max().item()  # float16 holds values near 1 best
            factors[tensor] = factor
            arrays["grad." + tensor] = (p.grad.numpy() / factor).astype(np.float32 if tiny else np.float16)
    if tiny:
        with torch.no_grad():
            logits = [model(torch.tensor([rows[i]["tokens"]])).logits[0, -1].numpy() for i in gradient_rows]
        arrays["logits"] = np.stack(logits)
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
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
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
        "weight_decay": 0.0,
        "max_grad_norm": max_norm,
        "batches": batches,
        "steps": steps,
    }
    golden = {"r": r, "lora_alpha": alpha, "gradient": gradient, "curve": curve, "full": factors}
    save_file(arrays, os.path.join(out, name + ".golden.safetensors"))
    with open(os.path.join(out, name + ".golden.json"), "w") as f:
        text = json.dumps(golden, indent=1)
        lines = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
        f.write(text[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n")


def cycle(rows, size, steps):
    """Row numbers of each step: size at a time in order, starting over at the end."""
    return [[(step * size + i) % rows for i in range(size)] for step in range(steps)]


def tiny(out):
    for name, quant, layers, tied in [
        ("tiny-llama-q4_1", gguf.GGMLQuantizationType.Q4_1, 2, True),
        ("tiny-llama-q8_0", gguf.GGMLQuantizationType.Q8_0, 1, False),
    ]:
        base = os.path.join(out, name + ".gguf")
        vocabulary = write_tiny(base, quant, layers, tied, seed=7)
        rows = random_rows(vocabulary, 12, seed=11)
        write_golden(
            name, base, rows, cycle(len(rows), 4, 20), r=4, alpha=8, lr=2e-3, gradient_rows=list(range(8)),
            gradient_b=0.1, curve_b=0.0, full=lambda _: True, tiny=True, out=out,
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
    """Compares gguf_llama.load with transformers' own reading of the same file."""
    from transformers import AutoModelForCausalLM

    ours = gguf_llama.load(base).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        os.path.dirname(base), gguf_file=os.path.basename(base), dtype=torch.float32
    ).state_dict()
    worst = 0.0
    for name, w in ours.items():
        worst = max(worst, (w - theirs[name]).abs().max().item())
    print(f"largest difference between both readings of {os.path.basename(base)}: {worst:g}")
    if worst > 1e-6 or ours.keys() != theirs.keys():
        raise SystemExit(f"{base}: transformers reads other weights than gguf_llama.py")


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
    commands.add_parser("tiny").add_argument("out")
    real = commands.add_parser("smollm2")
    real.add_argument("base")
    real.add_argument("out")
    arguments = parser.parse_args()
    if arguments.command == "tiny":
        tiny(arguments.out)
    else:
        smollm2(arguments.base, arguments.out)


if __name__ == "__main__":
    main()
