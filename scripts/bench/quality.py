"""Does hone learn what PEFT learns? The same rows and the same recipe, several seeds, two tasks.

    python quality.py prepare --hone bin/hone --model MODEL.gguf --data DIR
    python quality.py run --hone bin/hone --model MODEL.gguf --data DIR --out DIR [--device cuda] [--hone-device cuda] [--seeds 3]
        [--tasks mcq,intent] [--engines hone,peft]
    python quality.py report --out DIR [--seeds 3] [--tasks mcq,intent]

prepare writes the rows of both tasks and their tokens (it needs transformers' GGUF tokenizers, so do it where these work). run
trains each task with each seed: hone with its trainer process on --hone-device, PEFT on --device in float32 without TF32 over the
same weights, dequantised, both at once where PEFT's device is a GPU. Every run is kept in --out/runs as it finishes, and a second
call goes on there. report writes the results of kept runs. It needs torch, transformers, peft, gguf, numpy and matplotlib, and no
network.

Both adapters are judged by the same code, transformers on --device in float32: the loss of the validation rows, and the accuracy
over the test questions, which share no word (mcq) or wording (intent) with training. A question of mcq is right if its letter is
the likeliest of the four; an intent, if greedy decoding would write exactly the label and end there. Writes quality.md, losses.csv
and one plot of the losses of each task, hone and PEFT on the same axes.

mcq      examples/mcq, rows as `hone dataset mcq` writes them
intent   what a customer of a small shop wants, in twelve labels of free text, each seen in other wordings than are tested
"""

import argparse
import concurrent.futures
import csv
import glob
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time

import hone

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden"))

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
TASKS = ("mcq", "intent")
# What the demo does; PEFT gets the same, with transformers' schedule and torch's AdamW.
RECIPE = {
    "r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "batch_size": 4,
    "num_train_epochs": 3,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
}
EVALUATIONS = 3  # an epoch

# Wordings of each intent: the last two are kept for the test. {o} is an order's number, {t} a thing.
INTENTS = {
    "track the parcel": [
        "where is my order {o}", "order {o} has not come yet, where is it", "can you see where parcel {o} is now",
        "when will the {t} get here", "I am still waiting for the {t} of order {o}", "has order {o} left your store already",
    ],
    "cancel the order": [
        "please stop order {o}", "I do not want the {t} any more, do not send it", "call off order {o}",
        "I changed my mind about the {t}", "forget about order {o}, I need no {t}", "do not ship the {t} after all",
    ],
    "ask for a refund": [
        "I want my money back for the {t}", "please pay me back for order {o}", "you owe me the price of the {t}",
        "return the payment of order {o} to me", "the {t} was not worth it, give back what I paid", "when do I see my money for order {o} again",
    ],
    "report damage": [
        "the {t} came broken", "the {t} has a crack", "there is a hole in the {t} of order {o}",
        "order {o} arrived in pieces", "the {t} was smashed when I opened the box", "one side of the {t} is bent and torn",
    ],
    "change the address": [
        "I have moved, send order {o} to my new home", "please deliver the {t} to another street", "the address of order {o} is wrong",
        "can the {t} go to my office instead", "I live elsewhere now, so order {o} must go there", "bring the {t} to my neighbour's house, not mine",
    ],
    "ask for an invoice": [
        "I need a bill for order {o}", "send me the invoice of the {t}", "my company wants paper for order {o}",
        "where is the receipt of the {t}", "please write me a receipt for order {o}", "the tax office asks for the bill of the {t}",
    ],
    "ask about the price": [
        "how much is the {t}", "what does the {t} cost", "is the {t} cheaper this week",
        "tell me the price of the {t}", "what would I pay for a {t}", "for how much do you sell the {t}",
    ],
    "ask about stock": [
        "do you have the {t}", "is the {t} sold out", "how many of the {t} are left",
        "when do you get the {t} again", "can I still buy the {t}, or is there none", "are there any more of the {t} on your shelves",
    ],
    "change the payment": [
        "I want to pay order {o} by card", "can I pay the {t} in cash", "take the money for order {o} from my other account",
        "my card is new, use it for the {t}", "let me settle order {o} with a bank transfer", "I would rather pay for the {t} when it comes",
    ],
    "give praise": [
        "the {t} is wonderful, thank you", "I love my new {t}", "order {o} was perfect",
        "you did a great job with order {o}", "never had a better {t}, well done", "thanks to all of you, the {t} makes me happy",
    ],
    "open an account": [
        "how do I sign up with you", "I want to register before I buy the {t}", "make me a customer, please",
        "can I get a login for your shop", "I am new here, create a profile for me", "what must I do to become a member and buy a {t}",
    ],
    "speak to a person": [
        "let me talk to somebody", "I want a human, not a machine", "connect me with your staff about order {o}",
        "call me on the phone about the {t}", "is there anybody real that I can ask about order {o}", "give me a colleague who knows the {t}",
    ],
}  # fmt: skip
THINGS = "lamp kettle chair bicycle jacket clock mirror radio carpet guitar blanket camera teapot ladder basket".split()
HELD_WORDINGS = 2


def intent_rows():
    """Training, validation and test rows: validation has wordings of training with other words, the test has its own."""
    draw = random.Random(11)
    seen = set()

    def rows(count, first, end):
        made = []
        while len(made) < count:
            label = list(INTENTS)[len(made) % len(INTENTS)]
            text = draw.choice(INTENTS[label][first:end])
            text = text.format(o=draw.randrange(1000, 9999), t=draw.choice(THINGS))
            text = draw.choice(["", "hello, ", "good morning, ", "hi, "]) + text + draw.choice(["", ".", "?", ", please"])
            if text not in seen:
                seen.add(text)
                made.append({"messages": [{"role": "user", "content": "What does the customer want?\n" + text}, {"role": "assistant", "content": label}]})
        draw.shuffle(made)
        return made

    wordings = min(map(len, INTENTS.values()))
    train = rows(480, 0, wordings - HELD_WORDINGS)
    return train, rows(96, 0, wordings - HELD_WORDINGS), rows(240, wordings - HELD_WORDINGS, wordings)


def mcq_rows(binary, directory):
    """As the demo makes them; the test questions with their answers pass through the same command."""
    examples = os.path.join(REPOSITORY, "examples", "mcq")
    with open(os.path.join(examples, "test_answers.csv")) as f:
        answers = {row["ID"]: row["Answer"] for row in csv.DictReader(f)}
    solved = os.path.join(directory, "mcq-test.csv")
    with open(os.path.join(examples, "test.csv")) as f, open(solved, "w", newline="") as out:
        questions = csv.DictReader(f, skipinitialspace=True)
        columns = [name for name in questions.fieldnames if name != "ID"] + ["Answer"]
        writer = csv.DictWriter(out, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(q | {"Answer": answers[q["ID"]]} for q in questions)

    def rows(source, name, share):
        target = os.path.join(directory, name)
        command = [binary, "dataset", "mcq", "--in", source, "--out", target, "--valid", str(share)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [read_jsonl(os.path.join(target, f)) for f in sorted(os.listdir(target)) if f in ("train.jsonl", "valid.jsonl")]

    train, valid = rows(os.path.join(examples, "train.csv"), "mcq-source", 0.15)
    return train, valid, rows(solved, "mcq-test", 0)[0]


def read_jsonl(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def write_jsonl(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def prepare(args):
    from transformers import AutoTokenizer

    from peer import read_rows

    os.makedirs(args.data, exist_ok=True)
    path = os.path.abspath(args.model)
    tokenizer = AutoTokenizer.from_pretrained(os.path.dirname(path), gguf_file=os.path.basename(path))
    for task in TASKS:
        parts = intent_rows() if task == "intent" else mcq_rows(args.hone, args.data)
        tokens = {}
        for part, rows in zip(("train", "valid", "test"), parts):
            file = os.path.join(args.data, f"{task}-{part}.jsonl")
            write_jsonl(file, rows)
            tokens[part] = read_rows(tokenizer, file)
        if task == "mcq":
            tokens["letters"] = [tokenizer(c, add_special_tokens=False).input_ids[0] for c in "ABCD"]
        with open(os.path.join(args.data, f"{task}-tokens.json"), "w") as f:
            json.dump(tokens, f)
        print(task, {part: len(rows) for part, rows in tokens.items()}, "longest", max(len(t) for t, _ in tokens["train"]))


def read_tokens(args, task):
    with open(os.path.join(args.data, f"{task}-tokens.json")) as f:
        return json.load(f)


def steps_of(args, rows):
    """Optimizer steps in all, and between two evaluations."""
    per_epoch = -(-rows // RECIPE["batch_size"])
    total = args.max_steps or per_epoch * RECIPE["num_train_epochs"]
    return total, max(1, min(per_epoch, total) // EVALUATIONS)


# hone.


def run_hone(args, task, seed):
    """One run of the trainer: its losses by step, and the directory of the adapter in PEFT's format."""
    work = os.path.join(args.out, "work")
    os.makedirs(work, exist_ok=True)
    model = hone.model_directory(os.path.join(work, f"model-{task}-{seed}"), args.model)
    rows = read_tokens(args, task)
    total, every = steps_of(args, len(rows["train"]))
    options = RECIPE | {"target_modules": ["all-linear"], "eval_strategy": "steps", "eval_steps": every, "save_strategy": "no", "logging_steps": 1}
    if args.max_steps:
        options["max_steps"] = total
        options.pop("num_train_epochs")
    options["device"] = args.hone_device
    options.pop("warmup_ratio")
    options["warmup_steps"] = warmup_of(total)
    train, valid = (os.path.join(args.data, f"{task}-{part}.jsonl") for part in ("train", "valid"))
    began = time.perf_counter()
    attempt = hone.train(
        os.path.abspath(args.hone), model, hone.digest(args.model), train, options, work, valid, seed=seed, niceness=0, threads=args.threads
    )
    if attempt.dataset["train_tokens"] != sum(len(t) for t, _ in rows["train"]):
        raise SystemExit(f"{task}: hone reads {attempt.dataset['train_tokens']} tokens, PEFT others: prepare the data again")
    adapter = os.path.dirname(glob.glob(os.path.join(attempt.directory, "adapter", "**", "adapter_config.json"), recursive=True)[0])
    result = {
        "train": [(e.data["step"], e.data["train_loss"]) for e in attempt.of("step")],
        "valid": [(e.data["step"], e.data["full_valid_loss"]) for e in attempt.of("eval")],
        "seconds": time.perf_counter() - began,
        "plan": {k: attempt.memory[k] for k in ("device", "layout", "forward", "backward", "micro_batch_tokens")},
    }
    # What is trained is kept at once; its judgement may wait for PEFT.
    trained = trained_directory(args, task, seed)
    shutil.rmtree(trained, ignore_errors=True)
    shutil.move(adapter, trained + ".part")
    with open(os.path.join(trained + ".part", "result.json"), "w") as f:
        json.dump(result, f)
    os.replace(trained + ".part", trained)
    shutil.rmtree(attempt.directory)


def trained_directory(args, task, seed):
    return os.path.join(args.out, "runs", f"hone-{task}-{seed}.trained")


def warmup_of(total):
    return math.ceil(total * RECIPE["warmup_ratio"])  # as transformers rounds it


# PEFT, and the judge of both.


class Torch:
    """The base model in float32 on a device, with one adapter after the other."""

    def __init__(self, args):
        import torch

        import gguf_model

        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.torch, self.device = torch, args.device
        self.base = gguf_model.load(args.model).to(args.device)
        self.base.config.use_cache = False

    def adapter(self, directory=None):
        """A new adapter of the recipe, or a stored one."""
        from peft import LoraConfig, PeftModel, get_peft_model

        if directory:
            return PeftModel.from_pretrained(self.base, directory).to(self.device).eval()
        config = LoraConfig(r=RECIPE["r"], lora_alpha=RECIPE["lora_alpha"], lora_dropout=RECIPE["lora_dropout"], target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(self.base, config).train()

    def batch(self, rows):
        torch, width = self.torch, max(len(t) for t, _ in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for k, (tokens, start) in enumerate(rows):
            ids[k, : len(tokens)] = torch.tensor(tokens)
            mask[k, : len(tokens)] = 1
            labels[k, start : len(tokens)] = ids[k, start : len(tokens)]
        return ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def answers(self, model, rows):
        """The logits that the answers of rows are predicted with, their labels, and which row each belongs to."""
        ids, mask, labels = self.batch(rows)
        inner = model.base_model.model
        hidden = inner.model(input_ids=ids, attention_mask=mask)[0][:, :-1]
        wanted = labels[:, 1:] != -100
        return inner.lm_head(hidden[wanted]), labels[:, 1:][wanted], wanted.nonzero()[:, 0]

    def loss(self, model, rows):
        """Mean loss over the answers' tokens of many rows."""
        total = count = 0.0
        with self.torch.no_grad():
            for k in range(0, len(rows), 32):
                logits, labels, _ = self.answers(model, rows[k : k + 32])
                total += self.torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                count += len(labels)
        return total / count

    def accuracy(self, model, rows, letters=None):
        right = 0
        with self.torch.no_grad():
            for k in range(0, len(rows), 32):
                part = rows[k : k + 32]
                logits, labels, owner = self.answers(model, part)
                for i in range(len(part)):
                    mine, gold = logits[owner == i], labels[owner == i]
                    if letters:
                        right += letters[mine[0][letters].argmax().item()] == gold[0].item()
                    else:
                        right += bool((mine.argmax(-1) == gold).all())
        return right / len(rows)

    def judge(self, model, tokens):
        """What the adapter has come to; the base model is free for another one then."""
        model.eval()
        judged = {"valid_loss": self.loss(model, tokens["valid"]), "accuracy": self.accuracy(model, tokens["test"], tokens.get("letters"))}
        self.base = model.unload()
        return judged

    def train(self, args, task, seed):
        from transformers import get_cosine_schedule_with_warmup

        torch = self.torch
        torch.manual_seed(seed)
        tokens = read_tokens(args, task)
        rows = tokens["train"]
        total, every = steps_of(args, len(rows))
        model = self.adapter()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RECIPE["learning_rate"], weight_decay=RECIPE["weight_decay"])
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup_of(total), total)
        order, result = [], {"train": [], "valid": []}
        began = time.perf_counter()
        for step in range(1, total + 1):
            if not order:
                order = random.Random(f"{seed} {step}").sample(range(len(rows)), len(rows))
            batch, order = order[: RECIPE["batch_size"]], order[RECIPE["batch_size"] :]
            logits, labels, _ = self.answers(model, [rows[i] for i in batch])
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, RECIPE["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            result["train"].append((step, loss.item()))
            if step % every == 0 or step == total:
                model.eval()
                result["valid"].append((step, self.loss(model, tokens["valid"])))
                model.train()
        result["seconds"] = time.perf_counter() - began
        return result | self.judge(model, tokens)


def run(args):
    runs = os.path.join(args.out, "runs")
    os.makedirs(runs, exist_ok=True)
    jobs = [(task, seed) for task in args.tasks for seed in range(1, args.seeds + 1)]

    def stored(engine, task, seed):
        return os.path.join(runs, f"{engine}-{task}-{seed}.json")

    def keep(path, result):
        with open(path + ".part", "w") as f:
            json.dump(result, f)
        os.replace(path + ".part", path)
        print(os.path.basename(path), {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}, flush=True)

    torch = Torch(args)

    def judge(task, seed):
        trained = trained_directory(args, task, seed)
        with open(os.path.join(trained, "result.json")) as f:
            result = json.load(f)
        keep(stored("hone", task, seed), result | torch.judge(torch.adapter(trained), read_tokens(args, task)))
        shutil.rmtree(trained)

    # Beside a GPU, hone and PEFT work at the same time; on one CPU they take turns.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    pending = {}
    for task, seed in jobs:
        if "hone" not in args.engines or os.path.exists(stored("hone", task, seed)):
            continue
        if os.path.exists(trained_directory(args, task, seed)):
            judge(task, seed)
            continue
        pending[task, seed] = pool.submit(run_hone, args, task, seed)
        if args.device == "cpu":
            concurrent.futures.wait([pending[task, seed]])

    def judge_done(wait=False):
        for (task, seed), future in list(pending.items()):
            if wait or future.done():
                future.result()
                del pending[task, seed]
                judge(task, seed)

    for task, seed in jobs:
        if "peft" in args.engines and not os.path.exists(stored("peft", task, seed)):
            keep(stored("peft", task, seed), torch.train(args, task, seed))
        judge_done()
    judge_done(wait=True)
    for task in args.tasks:
        before = os.path.join(runs, f"base-{task}.json")
        if not os.path.exists(before):
            model = torch.adapter()  # B is 0: the base model
            keep(before, torch.judge(model, read_tokens(args, task)))
    shutil.rmtree(os.path.join(args.out, "work"), ignore_errors=True)
    if set(args.engines) == {"hone", "peft"}:
        report(args)


def report(args):
    results = {}
    for task in args.tasks:
        for seed in range(1, args.seeds + 1):
            for engine in ("hone", "peft"):
                with open(os.path.join(args.out, "runs", f"{engine}-{task}-{seed}.json")) as f:
                    results[engine, task, seed] = json.load(f)
    write_report(args, results)


def write_report(args, results):
    lines = ["| task | | seed | test accuracy | validation loss |", "| --- | --- | --- | --- | --- |"]
    seeds = range(1, args.seeds + 1)
    verdicts = []
    for task in args.tasks:
        with open(os.path.join(args.out, "runs", f"base-{task}.json")) as f:
            base = json.load(f)
        lines.append(f"| {task} | base model | | {base['accuracy']:.1%} | {base['valid_loss']:.4f} |")
        for engine in ("hone", "peft"):
            for seed in seeds:
                r = results[engine, task, seed]
                lines.append(f"| {task} | {engine} | {seed} | {r['accuracy']:.1%} | {r['valid_loss']:.4f} |")
            mean = {k: statistics.mean(results[engine, task, s][k] for s in seeds) for k in ("accuracy", "valid_loss")}
            lines.append(f"| {task} | {engine}, mean | | {mean['accuracy']:.1%} | {mean['valid_loss']:.4f} |")
        verdicts += [verdict(task, k, [[results[e, task, s][k] for s in seeds] for e in ("hone", "peft")]) for k in ("accuracy", "valid_loss")]
    text = "\n".join(lines + [""] + verdicts)
    print(text)
    with open(os.path.join(args.out, "quality.md"), "w") as f:
        f.write(text + "\n")
    with open(os.path.join(args.out, "losses.csv"), "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["task", "engine", "seed", "kind", "step", "loss"])
        for (engine, task, seed), r in sorted(results.items()):
            for kind in ("train", "valid"):
                out.writerows([task, engine, seed, kind, step, f"{loss:.6g}"] for step, loss in r[kind])
    for task in args.tasks:
        plot(args, task, results)


def verdict(task, what, values):
    """Equal within the spread of the seeds: the means are no further apart than the runs of either side are."""
    means = [statistics.mean(v) for v in values]
    spread = max(max(v) - min(v) for v in values)
    apart = abs(means[0] - means[1])
    return f"- {task}, {what}: the means are {apart:.4f} apart, the runs of one side up to {spread:.4f}: {'pass' if apart <= spread else 'FAIL'}"


def plot(args, task, results):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for engine, colour in (("hone", "tab:blue"), ("peft", "tab:orange")):
        for seed in range(1, args.seeds + 1):
            r = results[engine, task, seed]
            label = {"hone": "hone", "peft": "PEFT"}[engine] if seed == 1 else None
            axes[0].plot(*zip(*smooth(r["train"])), color=colour, alpha=0.8, linewidth=1, label=label)
            axes[1].plot(*zip(*r["valid"]), color=colour, alpha=0.8, linewidth=1, marker="o", markersize=3, label=label)
    for axis, title in zip(axes, ("training loss, mean of 20 steps", "validation loss")):
        axis.set_title(f"{task}: {title}")
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("nats a token")
    figure.tight_layout()
    figure.savefig(os.path.join(args.out, f"loss-{task}.png"), dpi=120)
    plt.close(figure)


def smooth(points, width=20):
    return [(step, statistics.mean(loss for _, loss in points[max(0, i + 1 - width) : i + 1])) for i, (step, _) in enumerate(points)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "run", "report"])
    parser.add_argument("--hone", help="the program")
    parser.add_argument("--model", help="GGUF file")
    parser.add_argument("--data", help="directory of the prepared rows")
    parser.add_argument("--out", help="directory of the results")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of PEFT, and of the judgement")
    parser.add_argument("--hone-device", default="cpu", choices=["cpu", "cuda"], help="of hone")
    parser.add_argument("--engines", default="hone,peft", type=lambda s: s.split(","), help="which to run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS), type=lambda s: s.split(","))
    parser.add_argument("--threads", type=int, default=0, help="of hone; 0 means all cores")
    parser.add_argument("--max-steps", type=int, default=0, help="end early, to try the script out")
    args = parser.parse_args()
    needs = {"prepare": ["hone", "model", "data"], "run": ["hone", "model", "data", "out"], "report": ["out"]}[args.command]
    for name in needs:
        if not getattr(args, name):
            parser.error(f"{args.command} needs --{name}")
    {"prepare": prepare, "run": run, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
