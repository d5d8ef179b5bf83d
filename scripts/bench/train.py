"""make bench-train: how fast hone trains on this machine, beside PEFT in the same minutes.

    python train.py --hone bin/hone --peak build/peak --model MODEL.gguf [--rows text,answers,...] [--repetitions 3] [--out build]

Every figure of hone is of the trainer process that the server starts, on its events; PEFT's are of peer.py. They take turns, and
figures are medians over the repetitions. Tokens are those of the rows: padding never counts, and a prefix that rows share
counts in each. Dropout is the same on both sides. Everything runs at the niceness of the server's trainer. Writes
bench-train.json and bench-train.md, and ends with 1 if a bar was missed or a row could not be measured.

LLAMA_FINETUNE names a llama-finetune-lora of qvac-fabric-llm.cpp, which is measured beside the others if it is given.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import chat
import hone
import workload

ROWS = ("text", "answers", "demo", "large", "together", "overhead")
HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
COMMON = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, "learning_rate": 2e-4}
ADAPTER = {"r": 8, "lora_alpha": 16.0, "target_modules": ["q_proj", "v_proj"]}
DEMO = {"r": 16, "lora_alpha": 32.0, "target_modules": ["all-linear"], "lora_dropout": 0.05, "batch_size": 4}


class Peer:
    """A PEFT process; see peer.py."""

    def __init__(self, bench, rows, kind, rank, alpha, modules):
        self.name = f"PEFT {kind}"
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "peer.py"), bench.model, rows, kind, str(rank), str(alpha), modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(os.path.join(bench.work, f"peer-{kind}.log"), "w"),
            text=True,
            preexec_fn=lambda: os.nice(hone.NICENESS),
        )
        self.ready = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def epoch(self, **setting):
        self.process.stdin.write(json.dumps(setting) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Contender:
    """One line of a row: a name and how to run it once, which gives seconds, tokens, rows and peak_bytes. pid is of the
    process that it runs in, 0 if it starts one and waits for its end."""

    def __init__(self, name, run, pid=0):
        self.name, self.once, self.pid, self.results = name, run, pid, []

    def run(self):
        began, busy, own = time.perf_counter(), busy_seconds(), self.own_seconds()
        result = self.once()
        others = busy_seconds() - busy - (self.own_seconds() - own)
        cores = len(os.sched_getaffinity(0))
        self.results.append(result | {"others": max(0.0, others / cores / (time.perf_counter() - began))})
        return self.results[-1]

    def own_seconds(self):
        if self.pid:
            with open(f"/proc/{self.pid}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def median(self, unit):
        return statistics.median(r[unit] / r["seconds"] for r in self.results)

    def peak(self):
        return max(r["peak_bytes"] for r in self.results)


def busy_seconds():
    """Processor time that all processes of the machine have used, and that its host gave to others."""
    with open("/proc/stat") as f:
        user, nice, system, _, _, irq, soft, steal = map(int, f.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class Bench:
    def __init__(self, args):
        self.args = args
        self.model = os.path.abspath(args.model)
        self.binary = os.path.abspath(args.hone)
        self.work = tempfile.mkdtemp(prefix="bench-train-", dir=args.out)
        self.directory = hone.model_directory(os.path.join(self.work, "model"), self.model)
        self.digest = hone.digest(self.model)
        self.text = os.path.join(self.work, "text.jsonl")
        workload.write(self.text, 64)
        self.report = {"machine": machine(), "rows": {}, "bars": []}
        self.markdown = []
        self.disturbed = 0.0  # the most that other programs had of the cores in any run

    # What is written down.

    def say(self, line=""):
        print(line, flush=True)
        self.markdown.append(line)

    def bar(self, row, what, figure, wanted, at_least=True, shown="{:.2f}"):
        passed = figure >= wanted if at_least else figure <= wanted
        self.report["bars"].append({"row": row, "bar": what, "figure": figure, "wanted": wanted, "pass": passed})
        sign = ">=" if at_least else "<="
        self.say(f"\n**{'pass' if passed else 'FAIL'}**: {what}: {shown.format(figure)} (bar: {sign} {shown.format(wanted)})")

    def table(self, row, contenders, unit, of):
        """A row's figures; of is the contender that the others' ratios are against."""
        self.say(f"\n| | {unit}/s, median | by repetition | hone / this | peak memory, MiB | others had of the cores |\n| --- | --- | --- | --- | --- | --- |")
        best = of.median(unit)
        lines = []
        for c in contenders:
            rates = [r[unit] / r["seconds"] for r in c.results]
            ratio = best / c.median(unit)
            others = [r["others"] for r in c.results]
            self.disturbed = max(self.disturbed, *others)
            lines.append({"name": c.name, "unit": unit, "median": c.median(unit), "rates": rates, "ratio": ratio, "peak_bytes": c.peak(), "others": others})
            each = ", ".join(f"{v:.1f}" for v in rates)
            self.say(f"| {c.name} | {c.median(unit):.1f} | {each} | {'' if c is of else f'{ratio:.2f}'} | {c.peak() >> 20} | {statistics.median(others):.0%} |")
        self.report["rows"].setdefault(row, []).extend(lines)

    # How things run.

    def ours(self, name, rows, options, batch, count):
        """A contender: the trainer on count rows after a first step, which warms up."""
        options = COMMON | options | {"batch_size": batch, "max_steps": 1 + count // batch}

        def run():
            attempt = hone.train(self.binary, self.directory, self.digest, rows, options, self.work)
            seconds, tokens, steps = attempt.window()
            shutil.rmtree(attempt.directory)
            self.last = attempt
            return {"seconds": seconds, "tokens": tokens, "rows": steps * batch, "peak_bytes": attempt.peak_bytes}

        return Contender(name, run)

    def take_turns(self, *contenders):
        for repetition in range(self.args.repetitions):
            turn = repetition % len(contenders)
            for c in contenders[turn:] + contenders[:turn]:
                r = c.run()
                speed = f"{r['tokens'] / r['seconds']:.1f} tokens/s, {r['rows'] / r['seconds']:.2f} rows/s"
                print(f"  {c.name}: {speed}, others had {r['others']:.0%} of the cores", flush=True)

    def same_tokens(self, peer):
        """Both sides must have read the same rows."""
        ours = self.last.dataset["train_tokens"]
        if ours != peer.ready["tokens"]:
            raise RuntimeError(f"hone reads {ours} tokens in these rows, PEFT {peer.ready['tokens']}")

    # The rows.

    def row_text(self):
        self.say("\n## The multiple-choice text: r 8 on q and v, batch 8, loss on all tokens")
        options = ADAPTER | {"train_on_all": True, "micro_batch_tokens": 1024}
        sorted8 = {"layout": "sorted", "batch": 8, "accumulate": 1, "loss": "all", "rows": 64}
        peer = Peer(self, self.text, "bf16", 8, 16, "q_proj,v_proj")
        try:
            plain = self.ours("hone", self.text, options | {"lora_dropout": 0.0}, 8, 64)
            dropped = self.ours("hone, dropout 0.05", self.text, options | {"lora_dropout": 0.05}, 8, 64)
            peft = Contender("PEFT bf16, sorted by length, batch 8", lambda: peer.epoch(**sorted8, dropout=0, seed=1), peer.process.pid)
            peft_dropped = Contender("the same, dropout 0.05", lambda: peer.epoch(**sorted8, dropout=0.05, seed=1), peer.process.pid)
            user = Contender(
                "PEFT bf16 as the first user ran it: padded to 256, 2 x 4, dropout 0.05",
                lambda: peer.epoch(layout="padded", batch=2, accumulate=4, dropout=0.05, loss="all", rows=32, seed=1),
                peer.process.pid,
            )
            contenders = [plain, peft, dropped, peft_dropped, user]
            self.take_turns(*contenders)
            self.same_tokens(peer)
        finally:
            peer.close()
        self.table("text", contenders, "tokens", plain)
        self.say(f"\nllama-finetune-lora: {self.llama_finetune()}")
        self.bar("text", "real tokens/s against PEFT's best plain setting", plain.median("tokens") / peft.median("tokens"), 2)
        peak, memory = plain.peak(), self.last.memory
        self.bar("memory", "peak memory with micro-batches of 1,024 tokens, GB", peak / 1e9, 1.6, at_least=False)
        self.say(f"\nPEFT takes {peft.peak() / 1e9:.2f} GB for it.")
        if memory:
            off = dropped.peak() / memory["total_bytes"] - 1
            self.bar("memory", "peak memory against the plan's estimate, off by", abs(off), 0.10, at_least=False)

    def row_answers(self):
        self.say("\n## The same with loss on the answers only")
        setting = {"layout": "sorted", "batch": 8, "accumulate": 1, "dropout": 0, "rows": 64, "seed": 1}
        peer = Peer(self, self.text, "bf16", 8, 16, "q_proj,v_proj")
        try:
            ours = self.ours("hone", self.text, ADAPTER | {"lora_dropout": 0.0}, 8, 64)
            plain = Contender("PEFT bf16, sorted by length, other labels -100", lambda: peer.epoch(**setting, loss="answers"), peer.process.pid)
            head = Contender("PEFT bf16 in a loop with the head on the answers alone", lambda: peer.epoch(**setting, loss="head"), peer.process.pid)
            self.take_turns(ours, plain, head)
            self.same_tokens(peer)
        finally:
            peer.close()
        self.table("answers", [ours, plain, head], "rows", ours)
        self.bar("answers", "questions/s against PEFT with the same mask", ours.median("rows") / plain.median("rows"), 2.5)

    def mcq(self):
        """The demo's training and validation rows, and the first 64 of them."""
        directory = os.path.join(self.work, "mcq")
        if not os.path.exists(directory):
            source = os.path.join(REPOSITORY, "examples", "mcq", "train.csv")
            subprocess.run([self.binary, "dataset", "mcq", "--in", source, "--out", directory], check=True, stdout=subprocess.DEVNULL)
            self.head(os.path.join(directory, "train.jsonl"), os.path.join(directory, "train64.jsonl"), 64)
        return (os.path.join(directory, f) for f in ("train.jsonl", "valid.jsonl", "train64.jsonl"))

    @staticmethod
    def head(source, target, count):
        with open(source) as f, open(target, "w") as out:
            out.writelines(line for _, line in zip(range(count), f))

    @staticmethod
    def alike(source, target):
        """The rows of about the median's length: steps take the same time, so that phases compare that are not the same steps."""
        with open(source) as f:
            lines = f.readlines()
        middle = statistics.median(map(len, lines))
        with open(target, "w") as out:
            out.writelines(line for line in lines if abs(len(line) - middle) <= 0.06 * middle)

    def row_demo(self):
        self.say("\n## The demo's recipe: r 16 on all linear layers, dropout 0.05, batch 4, loss on the answers")
        _, _, rows = self.mcq()
        setting = {"layout": "sorted", "batch": 4, "accumulate": 1, "dropout": 0.05, "loss": "answers", "rows": 64, "seed": 1}
        peers = []
        try:
            for kind in ("bf16", "fp32"):
                peers.append(Peer(self, rows, kind, 16, 32, "all-linear"))
            ours = self.ours("hone", rows, DEMO, 4, 64)
            others = [Contender(f"{p.name}, sorted by length", lambda p=p: p.epoch(**setting), p.process.pid) for p in peers]
            self.take_turns(ours, *others)
            self.same_tokens(peers[0])
        finally:
            for p in peers:
                p.close()
        self.table("demo", [ours, *others], "rows", ours)
        best = max(c.median("rows") for c in others)
        self.bar("demo", "questions/s against PEFT with the same settings", ours.median("rows") / best, 2)

    def llama_finetune(self):
        binary = os.environ.get("LLAMA_FINETUNE")
        if not binary:
            return "not run: LLAMA_FINETUNE names no binary"
        # The difference of two runs is the time of the rows that the second has more, without loading.
        took = []
        for count in (8, 16):
            rows = os.path.join(self.work, f"text{count}.jsonl")
            workload.write(rows, count)
            command = [binary, "-m", self.model, "-f", rows, "-ngl", "0", "-c", "256", "-b", "256", "-ub", "256", "-fa", "off"]
            command += ["--assistant-loss-only", "--num-epochs", "1", "--lora-rank", "8", "--lora-alpha", "16"]
            command += ["--lora-modules", "attn_q,attn_v", "--output-adapter", os.path.join(self.work, "llama.gguf")]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, preexec_fn=lambda: os.nice(hone.NICENESS))
            if done.returncode != 0:
                return f"ended with code {done.returncode}"
            took.append(time.perf_counter() - began)
        mean = self.last.dataset["train_tokens"] / self.last.dataset["train_rows"]
        rate = 8 * mean / (took[1] - took[0])
        self.report["rows"].setdefault("text", []).append({"name": "llama-finetune-lora", "unit": "tokens", "median": rate})
        return f"{rate:.1f} tokens/s (one run, loss on the answers)"

    def row_large(self):
        self.say("\n## A 4-bit model of the shape of Qwen2.5-1.5B, micro-batches of 1,024 tokens")
        shape = {"layers": 28, "d": 1536, "f": 8960, "kv": 256, "heads_size": 1536, "vocabulary": 151936}
        gguf = os.path.join(self.work, "large.gguf")
        subprocess.run([sys.executable, os.path.join(HERE, "random_model.py"), "qwen2.5-1.5b", self.args.large_type, gguf], check=True)
        rows = os.path.join(self.work, "large.jsonl")
        write_large_rows(rows)
        directory = hone.model_directory(os.path.join(self.work, "large-model"), gguf)
        options = COMMON | ADAPTER | {"lora_dropout": 0.0, "prefix_sharing": False, "batch_size": 8, "max_steps": 1 + self.args.repetitions}
        peaks = [self.peak()]
        attempt = hone.train(self.binary, directory, hone.digest(gguf), rows, options | {"micro_batch_tokens": 1024}, self.work)
        peaks.append(self.peak())
        os.unlink(gguf)
        steps = attempt.of("step")
        took = [b.at - a.at for a, b in zip(steps, steps[1:])]
        tokens = attempt.dataset["train_tokens"] / attempt.dataset["train_rows"] * 8
        flops = flops_per_token(shape, r=8, row=tokens / 8, targets=LARGE_ANSWER / (tokens / 8))
        achieved = flops * tokens / statistics.median(took) / 1e9
        peak = max(statistics.median(p[k]["median"] for p in peaks) for k in peaks[0])
        self.say("\n| FLOPs per token | tokens/s | achieved GF/s | measured matmul peak, GF/s | share |\n| --- | --- | --- | --- | --- |")
        share = achieved / peak
        speed = tokens / statistics.median(took)
        self.say(f"| {flops / 1e9:.2f} G | {speed:.1f} | {achieved:.0f} | {peak:.0f} | {share:.0%} |")
        kinds = ", ".join(f"{k} {v['median']:.0f} (best {v['best']:.0f})" for k, v in peaks[0].items())
        self.say(f"\nMatmul of 1,536 x 8,960 by 1,024 tokens, GF/s before the run: {kinds}. The largest of the medians is the peak.")
        self.report["rows"]["large"] = {
            "flops_per_token": flops, "tokens_per_second": speed, "achieved": achieved, "peaks": peaks, "seconds": took,
            "memory": attempt.memory, "peak_bytes": attempt.peak_bytes,
        }  # fmt: skip
        self.bar("large", "share of the measured matmul peak", share, 0.5)

    def peak(self):
        out = subprocess.run([self.args.peak], check=True, capture_output=True, text=True, preexec_fn=lambda: os.nice(hone.NICENESS))
        return json.loads(out.stdout)

    def row_together(self):
        self.say("\n## Chat and training at once on the same cores")
        rows, _, _ = self.mcq()
        train = os.path.join(self.work, "mcq", "alike.jsonl")
        self.alike(rows, train)
        options = DEMO | {"num_train_epochs": 1000, "eval_strategy": "no", "save_strategy": "no"}
        rounds = []
        for i in range(self.args.repetitions):
            directory = os.path.join(self.work, f"together{i}")
            rounds.append(chat.measure(self.binary, directory, self.args.name, train, options, self.args.phase_seconds))
            print("  " + json.dumps(rounds[-1]), flush=True)
        middle = {k: statistics.median(r[k] for r in rounds) for k in rounds[0] if not k.startswith("windows_")}
        alone, after = (statistics.median(w for r in rounds for w in r[k]) for k in ("windows_alone", "windows_after"))
        middle["train_back"] = after / alone
        self.report["rows"]["together"] = {"rounds": rounds, "median": middle}
        self.say("\n| | alone | together | alone again |\n| --- | --- | --- | --- |")
        self.say(f"| chat, tokens/s of 4 streams | {middle['chat_alone']:.1f} | {middle['chat_shared']:.1f} | |")
        self.say(f"| time to the first token, p95, s | {middle['first_alone_p95']:.2f} | {middle['first_shared_p95']:.2f} | |")
        self.say(f"| training, steps/s | {middle['steps_alone']:.3f} | {middle['steps_shared']:.3f} | {middle['steps_after']:.3f} |")
        self.bar("together", "share of chat's throughput that is lost", middle["chat_loss"], 0.25, at_least=False)
        self.bar("together", "p95 time to the first token, times", middle["first_ratio"], 2, at_least=False)
        self.bar("together", "share of its speed that training keeps beside chat", middle["train_share"], 0.10)
        # "All of it", within what the machine drifts.
        self.bar("together", "share of its speed that training has once chat is idle", middle["train_back"], 0.95)

    def row_overhead(self):
        self.say("\n## Time lost to resume states, evaluation set-up and logging, in an epoch of the demo")
        train, valid, _ = self.mcq()
        attempt = hone.train(self.binary, self.directory, self.digest, train, DEMO | {"num_train_epochs": 1}, self.work, valid)
        events = [e for e in attempt.events if e.data["type"] not in ("progress", "log")]
        lost = {"saved": 0.0, "checkpoint": 0.0}
        for before, e in zip(events, events[1:]):
            if e.data["type"] in lost:
                lost[e.data["type"]] += e.at - before.at
        plan = attempt.of("plan")[0]
        total = events[-1].at - plan.at
        lost["evaluation set-up"] = len(attempt.of("eval")) * self.evaluation_setup(valid)
        lost["logging"] = len(attempt.of("step")) * self.logging_cost()
        share = sum(lost.values()) / total
        self.say("\n| | " + " | ".join(lost) + " | epoch |\n| --- |" + " --- |" * (len(lost) + 1))
        self.say("| seconds | " + " | ".join(f"{v:.3f}" for v in lost.values()) + f" | {total:.1f} |")
        self.report["rows"]["overhead"] = lost | {"total": total}
        self.bar("overhead", "share of the time that is lost", share, 0.02, at_least=False, shown="{:.4f}")

    def evaluation_setup(self, valid):
        """Seconds of an evaluation that do not depend on the number of rows: twice the time of 16 rows less that of 32."""
        took = {}
        for count in (16, 32):
            path = os.path.join(self.work, f"valid{count}.jsonl")
            self.head(valid, path, count)
            options = COMMON | DEMO | {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2 + self.args.repetitions}
            _, _, rows = self.mcq()
            attempt = hone.train(self.binary, self.directory, self.digest, rows, options, self.work, path)
            events = [e for e in attempt.events if e.data["type"] not in ("progress", "log")]
            took[count] = statistics.median(e.at - b.at for b, e in zip(events, events[1:]) if e.data["type"] == "eval")
        return max(0.0, 2 * took[16] - took[32])

    @staticmethod
    def logging_cost():
        """Seconds to write a line of a step into a pipe, here a generous bound: Python's, with the reader's work."""
        event = {"type": "step", "step": 1, "total_steps": 1, "train_loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0}
        read, write = os.pipe()
        began = time.perf_counter()
        for _ in range(1000):
            os.write(write, json.dumps(event).encode() + b"\n")
            json.loads(os.read(read, 65536))
        os.close(read)
        os.close(write)
        return (time.perf_counter() - began) / 1000

    def run(self):
        self.say("# Training speed")
        self.say("\n" + ", ".join(f"{k}: {v}" for k, v in self.report["machine"].items()))
        for row in self.args.rows:
            try:
                getattr(self, "row_" + row)()
            except (hone.Refused, RuntimeError, subprocess.CalledProcessError, OSError) as e:
                self.say(f"\n**not measured**: {e}")
                self.report["bars"].append({"row": row, "bar": "measured", "figure": None, "wanted": None, "pass": False})
            self.write()
        if self.disturbed > 0.05:
            self.say(f"\n**Other programs had up to {self.disturbed:.0%} of the cores meanwhile: take these figures for a hint, and run this again alone.**")
        self.say("\n## Bars\n\n| row | bar | figure | wanted | |\n| --- | --- | --- | --- | --- |")
        for b in self.report["bars"]:
            figures = "| | |" if b["figure"] is None else f"| {b['figure']:.3g} | {b['wanted']:.3g} |"
            self.say(f"| {b['row']} | {b['bar']} {figures} {'pass' if b['pass'] else 'FAIL'} |")
        self.write()
        if not self.args.keep:
            shutil.rmtree(self.work)
        return all(b["pass"] for b in self.report["bars"])

    def write(self):
        for name, text in (("json", json.dumps(self.report, indent=1)), ("md", "\n".join(self.markdown))):
            with open(os.path.join(self.args.out, "bench-train." + name), "w") as f:
                f.write(text + "\n")


LARGE_ANSWER = 8 + 1  # trained tokens of a row: the answer's and the end of the turn


def write_large_rows(path):
    """Rows of 128 tokens for a tokenizer of bytes in ChatML, which writes 20 tokens of its own around the text."""
    with open(path, "w") as f:
        for i in range(64):
            text = "".join(chr(97 + (i * 31 + j * j * 7 + j * 13) % 26) for j in range(128 - 20 - 8))
            chatml = [{"role": "user", "content": text}, {"role": "assistant", "content": "answered"}]
            f.write(json.dumps({"messages": chatml}) + "\n")


def flops_per_token(s, r, row, targets):
    """Operations that a step needs for each token, of r on q and v: products with the weights forwards and, for the gradient
    of the activations, backwards (not below the first layer's adapter), of the adapter, of causal attention in rows of so many
    tokens, and of the head for so many targets a token. Whatever an engine computes twice does not count."""
    d, q, kv = s["d"], s["heads_size"], s["kv"]
    linear = s["layers"] * (2 * d * q + 2 * d * kv + 3 * d * s["f"])
    adapter = s["layers"] * r * ((d + q) + (d + kv))
    attention = s["layers"] * 12 * (row + 1) / 2 * q
    return 4 * linear - 2 * (d * q + 2 * d * kv) + 6 * adapter + attention + 4 * targets * d * s["vocabulary"]


def machine():
    name = platform.machine()
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "load average": os.getloadavg()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hone", default="bin/hone")
    parser.add_argument("--peak", default="build/peak", help="the program of scripts/bench/peak")
    parser.add_argument("--model", required=True, help="the default model's GGUF file")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="its name at the server")
    parser.add_argument("--rows", default=",".join(ROWS), type=lambda s: s.split(","), help=", ".join(ROWS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--phase-seconds", type=float, default=20, help="of chat, of training, and half of both together")
    parser.add_argument("--large-type", default="q4_k", choices=["q4_0", "q4_k"])
    parser.add_argument("--out", default="build")
    parser.add_argument("--keep", action="store_true", help="leave the working directory")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    os.makedirs(args.out, exist_ok=True)
    sys.exit(0 if Bench(args).run() else 1)


if __name__ == "__main__":
    main()
