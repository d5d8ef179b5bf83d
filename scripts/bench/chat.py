"""Chat and training at once: a server, four streams of chat, and a fine-tuning job beside them."""

import dataclasses
import http.client
import json
import os
import statistics
import subprocess
import threading
import time
import urllib.parse

STREAMS = 4
ANSWER = 64  # tokens
# Long enough that the time to the first token is mostly prefill, and different in each request, so that no cache has it.
QUESTION = (
    "Report {n} of stream {s}: the harbour of town {n} counted {a} boats on the first day and {b} on the second, and the "
    "weather was fair until the evening. Describe in some detail what the people of the harbour may have done on both days."
)


@dataclasses.dataclass
class Phase:
    """What the streams saw in one phase."""

    seconds: float = 0
    tokens: int = 0
    first: list = dataclasses.field(default_factory=list)  # seconds to the first token of each request

    def rate(self):
        return self.tokens / self.seconds

    def p95(self):
        ordered = sorted(self.first)
        return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


class Server:
    """`hone serve` on a free port over an empty data directory."""

    def __init__(self, binary, directory):
        self.log = open(os.path.join(directory, "serve.log"), "w")
        self.process = subprocess.Popen(
            [binary, "serve", "--host", "127.0.0.1", "--port", "0", "--data-dir", os.path.join(directory, "home")],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.address = urllib.parse.urlparse(line.split()[-1]).netloc
                break
        else:
            raise RuntimeError(f"the server did not start: see {self.log.name}")

    def request(self, method, path, body=None, headers=None):
        c = http.client.HTTPConnection(self.address, timeout=300)
        if isinstance(body, dict):
            body, headers = json.dumps(body), {"Content-Type": "application/json"}
        c.request(method, "/v1" + path, body, headers or {})
        response = c.getresponse()
        data = response.read()
        c.close()
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status} {data[:300]!r}")
        return json.loads(data)

    def upload(self, path):
        boundary = "bench-boundary"
        with open(path, "rb") as f:
            data = f.read()
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="train.jsonl"\r\n\r\n'
        )
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        return self.request("POST", "/files", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})["id"]

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Streams:
    """Four clients, each of which asks again as soon as it is answered, until stop."""

    def __init__(self, server, model):
        self.server, self.model = server, model
        self.lock, self.phase, self.failure = threading.Lock(), Phase(), None
        self.stopped = threading.Event()
        self.asked = 0
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(STREAMS)]
        for t in self.threads:
            t.start()

    def run(self, stream):
        try:
            while not self.stopped.is_set():
                with self.lock:
                    self.asked += 1
                    n = self.asked
                self.ask(stream, n)
        except Exception as e:  # whatever it is, the row is void
            self.failure = e

    def ask(self, stream, n):
        text = QUESTION.format(n=n, s=stream, a=17 * n % 89 + 3, b=29 * n % 97 + 2)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": ANSWER,
            "temperature": 0,
            "stream": True,
        }
        c = http.client.HTTPConnection(self.server.address, timeout=300)
        began = time.perf_counter()
        c.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = c.getresponse()
        if response.status != 200:
            raise RuntimeError(f"chat: {response.status} {response.read()[:300]!r}")
        first = True
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:]).get("choices")
            if not choices or not choices[0]["delta"].get("content"):
                continue
            with self.lock:  # a chunk is a token, or some that make one character: the same in every phase
                self.phase.tokens += 1
                if first:
                    self.phase.first.append(time.perf_counter() - began)
            first = False
            if self.stopped.is_set():
                break
        c.close()

    def measure(self, seconds):
        """The next so many seconds."""
        with self.lock:
            self.phase = phase = Phase()
        began = time.perf_counter()
        time.sleep(seconds)
        with self.lock:
            phase.seconds = time.perf_counter() - began
            self.phase = Phase()
        if self.failure:
            raise self.failure
        if not phase.first:
            raise RuntimeError("no request was answered in this phase")
        return phase

    def stop(self):
        self.stopped.set()
        for t in self.threads:
            t.join()


class Job:
    """A job that is long enough to be running all the time."""

    def __init__(self, server, model, rows, options):
        self.server = server
        body = {"model": model, "training_file": server.upload(rows), "seed": 1, "hone": options}
        self.id = server.request("POST", "/fine_tuning/jobs", body)["id"]

    def progress(self):
        """When, and how many optimizer steps are done, with the fraction of the running one."""
        job = self.server.request("GET", f"/fine_tuning/jobs/{self.id}")
        if job["status"] in ("failed", "cancelled", "succeeded"):
            raise RuntimeError(f"the job {job['status']} too early: {job['error']}")
        p = (job.get("hone") or {}).get("progress") or {}
        return time.perf_counter(), p.get("step", 0) + p.get("step_fraction", 0)

    def wait(self, steps):
        """Until so many steps are done."""
        while self.progress()[1] < steps:
            time.sleep(0.25)

    def measure(self, seconds):
        """Steps a second over about so many seconds, from change to change of what the server knows."""
        points = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            at, done = self.progress()
            if not points or done != points[-1][1]:
                points.append((at, done))
            time.sleep(0.2)
        points = points[1:]  # the first was not seen to change
        if len(points) < 2:
            return 0.0
        return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])

    def windows(self, seconds):
        """Speeds in four windows of half as long: what else the machine does for a while spoils one or two of them."""
        return [self.measure(seconds / 2) for _ in range(4)]

    def cancel(self):
        self.server.request("POST", f"/fine_tuning/jobs/{self.id}/cancel", {})
        while self.server.request("GET", f"/fine_tuning/jobs/{self.id}")["status"] != "cancelled":
            time.sleep(0.2)


def both(job, streams, seconds):
    """Measures the job and the streams in the same time."""
    speed = []
    t = threading.Thread(target=lambda: speed.append(job.measure(seconds)))
    t.start()
    phase = streams.measure(seconds)
    t.join()
    if not speed:
        raise RuntimeError("the job ended while it was measured")
    return phase, speed[0]


def measure(binary, directory, model, rows, options, seconds):
    """One round: streams alone, the job alone, both, the job alone again, streams alone again."""
    os.makedirs(directory, exist_ok=True)
    server = Server(binary, directory)
    try:
        streams = Streams(server, model)
        try:
            streams.measure(seconds / 2)  # warm
            alone = streams.measure(seconds)
        finally:
            streams.stop()
        job = Job(server, model, rows, options)
        job.wait(2)
        before = job.windows(seconds)
        streams = Streams(server, model)
        try:
            streams.measure(seconds / 4)
            shared, during = both(job, streams, 2 * seconds)
        finally:
            streams.stop()
        time.sleep(1)
        after = job.windows(seconds)
        job.cancel()
        streams = Streams(server, model)
        try:
            streams.measure(seconds / 4)
            again = streams.measure(seconds)
        finally:
            streams.stop()
    finally:
        server.close()
    solo = (alone.rate() + again.rate()) / 2
    first = Phase(first=alone.first + again.first).p95()
    return {
        "chat_alone": solo,
        "chat_shared": shared.rate(),
        "chat_loss": 1 - shared.rate() / solo,
        "first_alone_p95": first,
        "first_shared_p95": shared.p95(),
        "first_ratio": shared.p95() / first,
        "steps_alone": statistics.median(before),
        "steps_shared": during,
        "steps_after": statistics.median(after),
        "train_share": during / statistics.median(before),
        "windows_alone": before,
        "windows_after": after,
    }
