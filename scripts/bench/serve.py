"""make bench-serve: how fast hone answers on this machine, beside llama-server and transformers in the same minutes.

    python serve.py --hone bin/hone --llama DIR --model MODEL.gguf [--rows questions,single,...] [--repetitions 5] [--questions 200] [--out build]

The servers run side by side and take turns: a repetition is one run of each, and a ratio is that of the medians. Questions and stories
are new in each repetition; only what they share can be cached. Writes bench-serve.json and bench-serve.md, and ends with 1 if a bar was
missed or a row could not be measured.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import serving

ROWS = ("questions", "single", "stream", "streams", "adapters", "adapter-streams", "contended", "start", "memory")
ADAPTERS = 8


class Bench:
    def __init__(self, args, work):
        self.args, self.work, self.home = args, work, os.path.join(work, "home")
        os.makedirs(self.home)
        self.results, self.counter = [], 0
        self.q4_0 = os.path.join(work, "q4_0.gguf")
        self.loras, self.names = [], []

    def llama(self, slots, model=None, loras=()):
        return serving.Llama(os.path.join(self.args.llama, "llama-server"), model or self.args.model, slots, os.path.join(self.work, "llama.log"), loras=loras)

    def hone(self, **environment):
        server = serving.Hone(self.args.hone, self.home, environment)
        server.adapters = self.names
        with_model = server.connect()
        server.answer(with_model, 10_000_000)
        with_model.close()
        return server

    def fresh(self, count):
        """The first of so many questions that no server has seen."""
        self.counter += count
        return self.counter - count

    def turns(self, *runs):
        """Calls each function once a repetition, all with the same numbers; returns a list of results for each."""
        results = [[] for _ in runs]
        for _ in range(self.args.repetitions):
            first = self.fresh(1000)
            for run, into in zip(runs, results):
                into.append(run(first))
        return results

    def rate(self, server, inflight, adapters=0, count=None):
        """Questions a second, of so many questions in flight, spread over so many adapters."""
        count = count or self.args.questions

        def run(first):
            seconds, _ = serving.pool(server, count, inflight, lambda c, i: server.answer(c, first + i, i % adapters if adapters else None))
            return count / seconds

        return run

    def flow(self, server, streams, tokens, adapters=0):
        """Tokens a second of streams at once, and their times to the first token."""

        def run(first):
            seconds, times = serving.pool(server, streams, streams, lambda c, i: server.stream(c, first + i, tokens, i % adapters if adapters else None))
            return streams * tokens / seconds, [t[0] for t in times]

        return run

    def bar(self, row, what, value, least=None, most=None, detail=""):
        ok = (least is None or value >= least) and (most is None or value <= most)
        bar = f">= {least}" if least is not None else f"<= {most}"
        self.results.append({"row": row, "what": what, "value": value, "bar": bar, "pass": ok, "detail": detail})
        print(f"{'pass' if ok else 'FAIL'}  {row}: {what}: {value:.2f} ({bar})  {detail}", flush=True)

    def prepare_adapters(self):
        if self.loras:
            return
        for k in range(ADAPTERS):
            directory = os.path.join(self.work, f"lora{k}")
            serving.random_adapter(directory, k)
            out = subprocess.run(
                [self.args.hone, "models", "add-adapter", directory, "--base", serving.MODEL, "--suffix", f"lora{k}"],
                env=os.environ | {"HONE_HOME": self.home}, capture_output=True, text=True, check=True,
            ).stdout
            name = next(word for word in out.split() if word.startswith("ft:")).rstrip(".,")
            self.names.append(name)
            self.loras.append(os.path.join(self.home, "adapters", name.rsplit(":", 1)[1], "adapter.gguf"))

    def requantized(self):
        if not os.path.exists(self.q4_0):
            subprocess.run(
                [os.path.join(self.args.llama, "llama-quantize"), "--allow-requantize", self.args.model, self.q4_0, "Q4_0"],
                check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
        return self.q4_0


def median(values):
    return statistics.median(values)


def spread(name, values):
    return f"{name} {median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def questions(b):
    transformers = serving.Transformers(b.args.model, os.path.join(b.work, "transformers.log"))
    batch = 40
    with b.hone() as hone, b.llama(8) as llama, b.llama(8, b.requantized()) as fast:
        ours, theirs, q4, hf = b.turns(
            b.rate(hone, 8), b.rate(llama, 8, count=min(100, b.args.questions)), b.rate(fast, 8), lambda first: batch / transformers.seconds(first, batch, 8)
        )
    transformers.close()
    detail = "; ".join([spread("hone", ours), spread("llama-server", theirs), spread("on Q4_0", q4), spread("transformers", hf)]) + " questions/s"
    b.bar("questions, 8 in flight", "x llama-server, same file", median(ours) / median(theirs), least=3, detail=detail)
    b.bar("questions, 8 in flight", "x llama-server on Q4_0", median(ours) / median(q4), least=1.4)
    b.bar("questions, 8 in flight", "x transformers bf16, batches of 8", median(ours) / median(hf), least=2)


def single(b):
    with b.hone() as hone, b.llama(1) as llama:
        ours, theirs = b.turns(b.rate(hone, 1, count=b.args.questions // 2), b.rate(llama, 1, count=b.args.questions // 4))
    b.bar("questions, one at a time", "x llama-server", median(ours) / median(theirs), least=2.5, detail=spread("hone", ours) + "; " + spread("llama-server", theirs) + " questions/s")


def decode_rate(server):
    """Tokens a second of one stream of 128 tokens after its first token."""

    def run(first):
        c = server.connect()
        begin, total = server.stream(c, first, 128)
        c.close()
        return 127 / (total - begin)

    return run


def stream(b):
    with b.hone() as hone, b.llama(1) as llama:
        ours, theirs = b.turns(decode_rate(hone), decode_rate(llama))
    b.bar("one stream, 128 tokens", "x llama-server", median(ours) / median(theirs), least=1.25, detail=spread("hone", ours) + "; " + spread("llama-server", theirs) + " tokens/s")


def streams(b):
    for n in (8, 16):
        with b.hone(HONE_SEQUENCES="16") as hone, b.llama(n) as llama:
            ours, theirs = b.turns(b.flow(hone, n, 64), b.flow(llama, n, 64))
        rates = [[r for r, _ in side] for side in (ours, theirs)]
        p95 = [sorted(t for _, times in side for t in times) for side in (ours, theirs)]
        p95 = [times[int(0.95 * (len(times) - 1))] for times in p95]
        row = f"{n} streams of 64 tokens"
        b.bar(row, "x llama-server", median(rates[0]) / median(rates[1]), least=1.5, detail=spread("hone", rates[0]) + "; " + spread("llama-server", rates[1]) + " tokens/s")
        b.bar(row, "p95 time to first token, of llama-server's", p95[0] / p95[1], most=1, detail=f"{p95[0] * 1e3:.0f} against {p95[1] * 1e3:.0f} ms")


def adapters(b):
    b.prepare_adapters()
    with b.hone(HONE_SEQUENCES="16") as hone, b.llama(16, loras=b.loras) as llama:
        base, ours, theirs = b.turns(b.rate(hone, 16), b.rate(hone, 16, ADAPTERS), b.rate(llama, 16, ADAPTERS, count=32))
    detail = "; ".join([spread("base", base), spread("8 adapters", ours), spread("llama-server, its lora field", theirs)]) + " questions/s"
    b.bar("16 questions in flight over 8 adapters", "of the base alone", median(ours) / median(base), least=0.7, detail=detail)
    b.bar("16 questions in flight over 8 adapters", "x llama-server", median(ours) / median(theirs), least=4)


def adapter_streams(b):
    b.prepare_adapters()
    with b.hone(HONE_SEQUENCES="16") as hone:
        base, ours = b.turns(b.flow(hone, 16, 64), b.flow(hone, 16, 64, ADAPTERS))
    base, ours = [r for r, _ in base], [r for r, _ in ours]
    b.bar("16 streams of 64 tokens over 8 adapters", "of the base alone", median(ours) / median(base), least=0.6, detail=spread("base", base) + "; " + spread("8 adapters", ours) + " tokens/s")


def contended(b):
    def beside(run):
        def both(first):
            spinner = subprocess.Popen(["taskset", "-c", "0", sys.executable, "-c", "while True: pass"])
            try:
                return run(first)
            finally:
                spinner.kill()
                spinner.wait()

        return both

    with b.hone() as hone, b.llama(8) as llama:
        runs = [b.rate(hone, 8, count=b.args.questions // 2), b.rate(llama, 8, count=b.args.questions // 8)]
        ours, ours_beside, theirs, theirs_beside = b.turns(runs[0], beside(runs[0]), runs[1], beside(runs[1]))
    kept = median(ours_beside) / median(ours)
    b.bar("another process on one of the two cores", "keeps of its questions/s", kept, least=0.5, detail=f"llama-server keeps {median(theirs_beside) / median(theirs):.2f}; " + spread("hone beside it", ours_beside))


def start(b):
    def hone_start(_):
        with serving.Hone(b.args.hone, b.home) as server:
            c = server.connect()
            server.post(c, {"model": serving.MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 1, "temperature": 0})
            return time.perf_counter() - server.started

    def llama_start(_):
        with b.llama(4) as server:
            c = server.connect()
            server.post(c, {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 1, "temperature": 0})
            return time.perf_counter() - server.started

    ours, theirs = b.turns(hone_start, llama_start)
    b.bar("process start to first token", "seconds", median(ours), most=0.5, detail=f"llama-server {median(theirs):.2f} s")


def memory(b):
    b.prepare_adapters()
    with b.hone(HONE_SEQUENCES="8", HONE_CONTEXT_TOKENS="2048") as hone:
        serving.pool(hone, 64, 8, lambda c, i: hone.answer(c, i))
        serving.pool(hone, 8, 8, lambda c, i: hone.stream(c, i, 64))
        ours = hone.runner_peak()
    llama = serving.Llama(os.path.join(b.args.llama, "llama-server"), b.args.model, 8, os.path.join(b.work, "llama.log"), context=2048)
    with llama:
        serving.pool(llama, 32, 8, lambda c, i: llama.answer(c, i))
        serving.pool(llama, 8, 8, lambda c, i: llama.stream(c, i, 64))
        theirs = llama.peak_bytes()
    second = os.path.getsize(b.args.model)
    detail = f"peak {ours['VmHWM'] / 1e6:.0f} MB of the runner against {theirs['VmHWM'] / 1e6:.0f} + {second / 1e6:.0f} MB"
    b.bar("memory, 8 sequences of 2,048", "of llama-server's and one more copy of the weights", ours["VmHWM"] / (theirs["VmHWM"] + second), most=1, detail=detail)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--hone", required=True)
    p.add_argument("--llama", required=True, help="directory of llama-server and llama-quantize")
    p.add_argument("--model", required=True)
    p.add_argument("--rows", default=",".join(ROWS))
    p.add_argument("--repetitions", type=int, default=5)
    p.add_argument("--questions", type=int, default=200)
    p.add_argument("--out", default="build")
    args = p.parse_args()
    args.hone, args.model = os.path.abspath(args.hone), os.path.abspath(args.model)
    rows = args.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        p.error(f"unknown rows {sorted(unknown)}: expected some of {', '.join(ROWS)}")
    failures = []
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as work:
        b = Bench(args, work)
        if not {"adapters", "adapter-streams", "memory"}.isdisjoint(rows):
            b.hone().close()  # fetches the model, to which adapters belong
        for name in rows:
            try:
                globals()[name.replace("-", "_")](b)
            except Exception as e:  # the other rows still count
                failures.append(name)
                print(f"FAIL  {name}: not measured: {e}", flush=True)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "bench-serve.json"), "w") as f:
        json.dump({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "results": b.results, "not_measured": failures}, f, indent=1)
    with open(os.path.join(args.out, "bench-serve.md"), "w") as f:
        f.write("| case | figure | bar | | measured |\n| --- | --- | --- | --- | --- |\n")
        for r in b.results:
            f.write(f"| {r['row']}: {r['what']} | {r['value']:.2f} | {r['bar']} | {'pass' if r['pass'] else 'FAIL'} | {r['detail']} |\n")
    missed = [r for r in b.results if not r["pass"]]
    print(f"{len(b.results) - len(missed)} of {len(b.results)} bars passed" + (f"; not measured: {', '.join(failures)}" if failures else ""))
    return 1 if missed or failures else 0


if __name__ == "__main__":
    sys.exit(main())
