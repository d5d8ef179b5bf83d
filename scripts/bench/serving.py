"""The servers that `make bench-serve` compares, and the requests that it sends to each of them."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy
import safetensors.numpy

import workload

MODEL = "SmolLM2-135M-Instruct"
# 134 tokens that all questions share: an instruction and one solved example.
INSTRUCTION = (
    "You answer multiple-choice questions on general knowledge, science and everyday reasoning. Read the question and the four "
    "options carefully. Exactly one option is correct. Reply with only the letter of the correct option, which is A, B, C or D, "
    "and write nothing else: no explanation, no punctuation."
)
EXAMPLE = (
    "Question: A boy leaves a bowl of water outside on a hot dry day. Which of these will he most likely find in the evening?\n"
    "A. There is more water\nB. There is less water\nC. The water is frozen\nD. The bowl has melted\nAnswer: B\n\n"
)
TOPICS = "rivers bread bridges bees clocks rain paper boats salt drums maps kites wells looms lamps seeds".split()


def question(i):
    """The messages of a multiple-choice question: about 85 tokens beside what all share."""
    text, _ = workload.question(i, 1)
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": f"{EXAMPLE}Question: {text}\nAnswer:"}]


def story(i):
    topic = TOPICS[i % len(TOPICS)]
    text = f"Number {i}. Write a long and detailed story about {topic} and the people who work with {topic}, with at least ten paragraphs."
    return [{"role": "user", "content": text}]


class Server:
    """A server process with OpenAI's chat completions on self.address."""

    def connect(self):
        return http.client.HTTPConnection(self.address, timeout=600)

    def post(self, connection, body):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise RuntimeError(f"{self.name}: {response.status} {data[:300]!r}")
        return json.loads(data)

    def answer(self, connection, i, adapter=None):
        """One letter; adapter is the number of one of the adapters, None for the base model."""
        reply = self.post(connection, self.letter(question(i), adapter))
        text = reply["choices"][0]["message"]["content"]
        if text not in ("A", "B", "C", "D"):
            raise RuntimeError(f"{self.name} answered {text!r}")
        return text

    def stream(self, connection, i, tokens, adapter=None):
        """A story of so many tokens: seconds to the first one, seconds in all."""
        body = self.chat(adapter) | {
            "messages": story(i),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{self.name}: {response.status} {response.read()[:300]!r}")
        first, made = None, 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                made = chunk["usage"]["completion_tokens"]
            if first is None and chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - began
        if made != tokens:
            raise RuntimeError(f"{self.name} made {made} tokens of {tokens}")
        return first, time.perf_counter() - began

    def peak_bytes(self, pid=None):
        """Anonymous memory of the process that holds the model, and all of it with the pages of mapped files."""
        with open(f"/proc/{pid or self.process.pid}/status") as f:
            sizes = {k: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in f) if k in ("RssAnon", "VmHWM", "VmRSS")}
        return sizes

    def close(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Hone(Server):
    """`hone serve` over a data directory with the default model and, if wanted, adapters."""

    name = "hone"

    def __init__(self, binary, home, environment=None):
        self.log = open(os.path.join(home, "serve.log"), "a")
        self.environment = os.environ | {"HONE_HOME": home} | (environment or {})
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [binary, "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=self.log, text=True, env=self.environment
        )
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.address = urllib.parse.urlparse(line.split()[-1]).netloc
                break
        else:
            raise RuntimeError(f"hone did not start: see {self.log.name}")
        self.adapters = []

    def chat(self, adapter):
        return {"model": MODEL if adapter is None else self.adapters[adapter]}

    def letter(self, messages, adapter):
        return self.chat(adapter) | {"messages": messages, "guided_choice": ["A", "B", "C", "D"], "temperature": 0, "max_tokens": 1}

    def children(self):
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as f:
            found = [int(p) for p in f.read().split()]
        if not found:  # forked by another thread
            for task in os.listdir(f"/proc/{self.process.pid}/task"):
                with open(f"/proc/{self.process.pid}/task/{task}/children") as f:
                    found += [int(p) for p in f.read().split()]
        return found

    def runner_peak(self):
        return self.peak_bytes(self.children()[0])


class Llama(Server):
    """llama-server with as many slots as requests will be in flight."""

    def __init__(self, binary, model, slots, log, context=512, loras=()):
        self.name = "llama-server " + os.path.basename(model)
        self.log = open(log, "a")
        with socket.socket() as s:  # a port that is free now
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        command = [binary, "-m", model, "-t", "2", "-tb", "2", "--host", "127.0.0.1", "--port", str(port), "--no-webui"]
        command += ["-np", str(slots), "-c", str(context * slots), "-cb"]
        for path in loras:
            command += ["--lora", path]
        self.adapters = list(loras)
        self.started = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        while True:
            try:
                c = self.connect()
                c.request("GET", "/health")
                ready = c.getresponse().status == 200
                c.close()
                if ready:
                    break
            except OSError:
                pass
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with code {self.process.returncode}: see {log}")
            time.sleep(0.005)

    def chat(self, adapter):
        if not self.adapters:
            return {}
        return {"lora": [{"id": k, "scale": 1.0 if k == adapter else 0.0} for k in range(len(self.adapters))]}

    def letter(self, messages, adapter):
        grammar = 'root ::= "A" | "B" | "C" | "D"'
        return self.chat(adapter) | {"messages": messages, "grammar": grammar, "temperature": 0, "max_tokens": 1}


def pool(server, count, inflight, ask):
    """ask(connection, i) for i of count, so many at a time over connections that stay open: seconds, results."""
    results, lock, next_one, failures = [None] * count, threading.Lock(), iter(range(count)), []

    def work():
        connection = server.connect()
        while not failures:
            with lock:
                i = next(next_one, None)
            if i is None:
                break
            try:
                results[i] = ask(connection, i)
            except Exception as e:  # the row is void, whatever it is
                failures.append(e)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(inflight)]
    began = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - began, results


def random_adapter(directory, seed, layers=30, hidden=576, key_value=192, rank=8):
    """An adapter of random weights on q and v of the default model, as PEFT saves one."""
    os.makedirs(directory, exist_ok=True)
    draw = numpy.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module, out in (("q_proj", hidden), ("v_proj", key_value)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = (draw.standard_normal((rank, hidden)) / hidden**0.5).astype(numpy.float32)
            tensors[f"{prefix}.lora_B.weight"] = (draw.standard_normal((out, rank)) * 0.02).astype(numpy.float32)
    safetensors.numpy.save_file(tensors, os.path.join(directory, "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    with open(os.path.join(directory, "adapter_config.json"), "w") as f:
        json.dump(config, f)


class Transformers:
    """transformers' generate in bfloat16, batches of 8, padded on the left, in a process of its own."""

    def __init__(self, model, log):
        self.name = "transformers bf16"
        self.log = open(log, "a")
        here = os.path.dirname(os.path.abspath(__file__))
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(here, "generate.py"), model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.process.stdout.readline()

    def seconds(self, first, count, batch):
        """For so many questions from the first one on."""
        self.process.stdin.write(json.dumps([first, count, batch]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()
