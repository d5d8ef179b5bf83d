"""Runs the trainer process as the server does, and reads its events."""

import dataclasses
import hashlib
import json
import os
import subprocess
import tempfile
import time

# As internal/child starts a trainer: threads that wait at a barrier sleep, so that a busy core does not cost both.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
# Both sides of every comparison run with the niceness of the server's trainer.
NICENESS = 10


class Refused(Exception):
    """The trainer does not do what it was asked to: why, in its own words."""


@dataclasses.dataclass
class Event:
    at: float  # time.perf_counter() of its arrival
    data: dict


@dataclasses.dataclass
class Attempt:
    """What one run of the trainer reported."""

    events: list
    started: float
    ended: float
    peak_bytes: int
    directory: str

    def of(self, kind):
        return [e for e in self.events if e.data["type"] == kind]

    @property
    def plan(self):
        return self.of("plan")[0].data["plan"]

    @property
    def dataset(self):
        return self.of("dataset")[0].data

    @property
    def memory(self):
        found = self.of("memory")
        return found[0].data["memory"] if found else None

    def window(self, first=1):
        """Seconds and tokens from the end of optimizer step `first` to the last one's, with all that lies between."""
        steps = [e for e in self.of("step") if e.data["step"] >= first]
        return steps[-1].at - steps[0].at, steps[-1].data["trained_tokens"] - steps[0].data["trained_tokens"], len(steps) - 1


def model_directory(directory, gguf):
    """A model directory as the trainer expects it, with a link to the file."""
    os.makedirs(directory, exist_ok=True)
    link = os.path.join(directory, "base.gguf")
    if os.path.islink(link):
        os.unlink(link)
    os.symlink(os.path.abspath(gguf), link)
    return directory


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def train(binary, model, base_digest, rows, options, work, valid="", seed=1, timeout=3600, niceness=NICENESS, threads=0):
    """One attempt at a job, in a new directory below work. model is a model directory, options are TrainOptions."""
    directory = tempfile.mkdtemp(prefix="job-", dir=work)
    config = {
        "job_id": "ftjob-" + os.path.basename(directory),
        "attempt": 1,
        "model_dir": os.path.abspath(model),
        "base_model": "bench",
        "base_digest": base_digest,
        "training_file": os.path.abspath(rows),
        "validation_file": os.path.abspath(valid) if valid else "",
        "dir": os.path.join(directory, "a1"),
        "adapter_dir": os.path.join(directory, "adapter"),
        "adapter_id": "bench",
        "adapter_name": "ft:bench:local::bench",
        "cache_dir": os.path.join(work, "cache"),
        "seed": seed,
        "options": options,
        "threads": threads,
    }
    os.makedirs(config["dir"])
    os.makedirs(config["cache_dir"], exist_ok=True)
    started, events, peak = time.perf_counter(), [], 0
    with open(os.path.join(directory, "stderr.log"), "w+") as log:
        process = subprocess.Popen(
            [binary, "trainer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | ENVIRONMENT,
            preexec_fn=lambda: os.nice(niceness),
        )
        try:
            process.stdin.write(json.dumps(config) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                events.append(Event(time.perf_counter(), json.loads(line)))
                peak = max(peak, peak_of(process.pid))
                if events[-1].data["type"] == "plan":
                    check(events[-1].data["plan"], options)
                if time.perf_counter() - started > timeout:
                    raise Refused(f"the job took longer than {timeout} s")
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().strip().splitlines()
    attempt = Attempt(events, started, time.perf_counter(), peak, directory)
    for e in attempt.of("failed"):
        raise Refused(e.data["error"]["message"])
    if code != 0 or not attempt.of("done"):
        raise Refused(f"the trainer ended with code {code}: {said[-1] if said else 'it said nothing'}")
    return attempt


def check(plan, options):
    """A figure of other settings than those asked for would be worth nothing."""
    for name, wanted in options.items():
        # max_steps is total_steps in the plan, and the micro-batch stands in its memory part.
        have = plan.get({"max_steps": "total_steps"}.get(name, name))
        if name == "micro_batch_tokens":
            have = plan.get("memory", {}).get(name)
        if name in ("save_minutes", "target_modules", "device"):
            continue
        if have != wanted:
            raise Refused(f"trained with {name} = {have}, not {wanted}")


def peak_of(pid):
    """The most memory that a process has had resident, in bytes; 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) << 10
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0
