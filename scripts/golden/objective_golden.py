"""Writes the golden files of the trainer's other objectives over a tiny model of train_golden.py.

    python objective_golden.py TESTDATA_DIR

TESTDATA_DIR holds tiny-llama-q4_1.gguf and gets tiny-dpo.golden.{json,safetensors} and tiny-choice.golden.{json,
safetensors}. LoRA is on all seven projections, r 4, alpha 8, A and B of lora.py with B of bound b_bound. Rows are as in
train_golden.py: `tokens`, and `weights` that are 1 where a token is trained.

Direct preference optimisation: pi is the model with its adapter, ref the model without. log p(row) is the sum of the
log-probabilities of the row's trained tokens, and of a pair of rows

    ratio(row) = log pi(row) - log ref(row)                    reward(row) = beta ratio(row)
    sigmoid    -(1 - s) logsigmoid(beta d) - s logsigmoid(-beta d)    d = ratio(chosen) - ratio(rejected), s label_smoothing
    ipo        (ratio(chosen)/n(chosen) - ratio(rejected)/n(rejected) - 1/(2 beta))^2     n: number of trained tokens

The loss is the mean over the pairs. Losses, rewards and gradients are checked against those of TRL's DPOTrainer before they are
written. TRL smoothed the labels of sigmoid until 0.24; since 0.29 it ignores label_smoothing there, and its loss "aot"
of one pair is this formula.

    tiny-dpo.golden.json      r, lora_alpha, b_bound, pairs (chosen, rejected: rows; policy, reference: log p of both)
                              losses: name, loss_type, beta, label_smoothing, loss, pair_losses, rewards_chosen,
                              rewards_rejected (means), accuracy (share of pairs whose chosen row has the higher reward)
    tiny-dpo.golden.safetensors     NAME.TENSOR: gradient of the loss

Choice: every row asks for one of the tokens `choices` after position `position`; the loss of a row is the cross entropy of
the softmax over the logits of the choices alone, and the answer is right if its logit is the largest of them. The loss of
the batch is the mean.

    tiny-choice.golden.json   r, lora_alpha, b_bound, choices, rows (tokens, weights, position, answer: index in choices,
                              loss, right), loss, accuracy, token_loss (cross entropy over the whole vocabulary, mean)
    tiny-choice.golden.safetensors  TENSOR: gradient of the loss
"""

import json
import os
import random
import sys
import tempfile

import numpy as np
import torch
import trl
from datasets import Dataset
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid
from transformers import PreTrainedTokenizerFast

import gguf_model
import lora

BASE = "tiny-llama-q4_1.gguf"
R, ALPHA, B_BOUND = 4, 8, 0.1
LOSSES = [
    {"name": "sigmoid", "loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
    {"name": "smoothed", "loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1},
    {"name": "steep", "loss_type": "sigmoid", "beta": 0.8, "label_smoothing": 0.0},
    {"name": "ipo", "loss_type": "ipo", "beta": 0.1, "label_smoothing": 0.0},
]


def make_row(prompt, completion):
    return {"tokens": prompt + completion, "weights": [0] * len(prompt) + [1] * len(completion)}


def make_pairs(vocabulary, seed):
    """Six pairs: completions of 1 to 12 tokens; one pair's part in their third token, one's rejected row goes on where
    the chosen one ends."""
    rng = random.Random(seed)
    pairs = []
    for i in range(6):
        prompt = [rng.randrange(3, vocabulary) for _ in range(rng.randint(3, 25))]
        chosen, rejected = ([rng.randrange(3, vocabulary) for _ in range(rng.randint(2, 11))] + [2] for _ in range(2))
        if i == 1:
            chosen = [rng.randrange(3, vocabulary)]
        if i == 2:
            rejected = chosen[:2] + [(chosen[2] + 1) % vocabulary] + rejected
        if i == 3:
            rejected = chosen + rejected
        pairs.append((prompt, chosen, rejected))
    return pairs


def log_probability(model, row):
    tokens = torch.tensor(row["tokens"])
    logits = model(tokens[None]).logits[0]
    values = log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
    return (values * torch.tensor(row["weights"][1:])).sum()


def pair_loss(loss, chosen, rejected, n):
    if loss["loss_type"] == "ipo":
        return (chosen / n[0] - rejected / n[1] - 1 / (2 * loss["beta"])) ** 2
    d, s = loss["beta"] * (chosen - rejected), loss["label_smoothing"]
    return -(1 - s) * logsigmoid(d) - s * logsigmoid(-d)


def gradients(tensors):
    arrays = {name: p.grad.numpy().copy() for _, name, p in tensors}
    for _, _, p in tensors:
        p.grad = None
    return arrays


def check(what, ours, theirs, bound, floor=0.0):
    """The relative error of ours; numbers smaller than floor count as it."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), floor)
    if not error < bound:
        raise SystemExit(f"{what}: differs from TRL's by {error:g}")
    return error


def make_trainer(model, directory):
    """TRL's DPOTrainer over the model, with a new adapter, so that its reference is the model without one. The
    tokenizer only names the padding; rows go in as token ids."""
    vocabulary = {f"t{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t2", unk_token="t0")
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(directory, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_dropout=True),
        train_dataset=Dataset.from_list([{"prompt": "t5 t6", "chosen": " t7", "rejected": " t8"}]),
        processing_class=tokenizer,
        peft_config=lora.config(R, ALPHA),
    )


def trl_loss(trainer, loss, pairs):
    """TRL's loss of the pairs, mean rewards and accuracy; the loss is differentiated."""
    smoothed = loss["label_smoothing"] > 0
    trainer.loss_types = ["aot" if smoothed else loss["loss_type"]]
    trainer.beta, trainer.label_smoothing = loss["beta"], loss["label_smoothing"]
    trainer._metrics["train"].clear()
    trainer.model.train()
    total = 0.0
    for batch in [[p] for p in pairs] if smoothed else [pairs]:
        inputs = trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in batch])
        value = trainer._compute_loss(trainer.model, inputs, False) * (len(batch) / len(pairs))
        value.backward()
        total += value.item()
    metrics = trainer._metrics["train"]
    trainer.model.eval()
    return total, *(np.mean(metrics[f"rewards/{k}"]) for k in ("chosen", "rejected", "accuracies"))


def dpo(directory):
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(gguf_model.load(os.path.join(directory, BASE)), scratch)
        model = trainer.model.eval()
        tensors = lora.tensors_of(model)
        lora.initialise(tensors, B_BOUND)
        token_lists = make_pairs(model.config.vocab_size, seed=3)
        pairs = [{"chosen": make_row(p, c), "rejected": make_row(p, r)} for p, c, r in token_lists]
        for pair in pairs:
            with torch.no_grad():
                pair["policy"] = [log_probability(model, pair[k]).item() for k in ("chosen", "rejected")]
                with model.disable_adapter():
                    pair["reference"] = [log_probability(model, pair[k]).item() for k in ("chosen", "rejected")]
        arrays, losses = {}, []
        for loss in LOSSES:
            total, rewards, right = [], [], []
            for pair in pairs:
                ratios = [log_probability(model, pair[k]) - pair["reference"][i] for i, k in enumerate(("chosen", "rejected"))]
                value = pair_loss(loss, *ratios, [sum(pair[k]["weights"]) for k in ("chosen", "rejected")])
                (value / len(pairs)).backward()
                total.append(value.item())
                rewards.append([loss["beta"] * x.item() for x in ratios])
                right.append(float(rewards[-1][0] > rewards[-1][1]))
            ours = gradients(tensors)
            golden = loss | {
                "loss": float(np.mean(total)), "pair_losses": total, "accuracy": float(np.mean(right)),
                "rewards_chosen": float(np.mean(rewards, 0)[0]), "rewards_rejected": float(np.mean(rewards, 0)[1]),
            }
            theirs = trl_loss(trainer, loss, token_lists)
            names = ("loss", "rewards_chosen", "rewards_rejected", "accuracy")
            worst = max(check(f"{loss['name']}: {k}", golden[k], v, 1e-5, floor=1.0) for k, v in zip(names, theirs))
            trl_gradients = gradients(tensors)
            slope = max(check(f"{loss['name']}: gradient of {k}", v, trl_gradients[k], 1e-4) for k, v in ours.items())
            print(f"dpo {loss['name']}: loss {golden['loss']:.6f}, rewards {golden['rewards_chosen']:.6f} and {golden['rewards_rejected']:.6f}, "
                  f"accuracy {golden['accuracy']:.3f}; TRL {trl.__version__} agrees to {worst:.1g}, its gradients to {slope:.1g}")
            losses.append(golden)
            arrays |= {f"{loss['name']}.{k}": v for k, v in ours.items()}
    write(directory, "tiny-dpo", {"r": R, "lora_alpha": ALPHA, "b_bound": B_BOUND, "pairs": pairs, "losses": losses}, arrays)


def choice(directory):
    model, tensors = lora.add(gguf_model.load(os.path.join(directory, BASE)), R, ALPHA)
    lora.initialise(tensors, B_BOUND)
    rng = random.Random(4)
    choices = [68, 69, 70, 71]  # neighbours, as A to D are
    rows, token_loss = [], 0.0
    count = 8
    for i in range(count):
        prompt = [rng.randrange(3, model.config.vocab_size) for _ in range(rng.randint(4, 30))]
        logits = model(torch.tensor([prompt])).logits[0, -1]
        answer = logits[choices].argmax().item() if i % 2 else i // 2 % len(choices)  # some are right
        row = {"tokens": prompt + [choices[answer]], "weights": [0] * len(prompt) + [1], "position": len(prompt) - 1, "answer": answer}
        loss = cross_entropy(logits[choices], torch.tensor(answer))
        (loss / count).backward()
        token_loss += cross_entropy(logits, torch.tensor(choices[answer])).item() / count
        row |= {"loss": loss.item(), "right": bool(logits[choices].argmax() == answer)}
        rows.append(row)
    golden = {
        "r": R, "lora_alpha": ALPHA, "b_bound": B_BOUND, "choices": choices, "loss": float(np.mean([r["loss"] for r in rows])),
        "accuracy": float(np.mean([r["right"] for r in rows])), "token_loss": token_loss, "rows": rows,
    }
    print(f"choice: loss {golden['loss']:.6f}, accuracy {golden['accuracy']:.3f}; over the vocabulary {token_loss:.6f}")
    write(directory, "tiny-choice", golden, gradients(tensors))


def write(directory, name, golden, arrays):
    save_file(arrays, os.path.join(directory, name + ".golden.safetensors"))
    with open(os.path.join(directory, name + ".golden.json"), "w") as f:
        items = []
        for key, value in golden.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                value = "[\n" + ",\n".join("  " + json.dumps(v, separators=(",", ":")) for v in value) + "\n ]"
            else:
                value = json.dumps(value)
            items.append(f" {json.dumps(key)}: {value}")
        f.write("{\n" + ",\n".join(items) + "\n}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    dpo(sys.argv[1])
    choice(sys.argv[1])
