"""A real heddle cluster under test: real binaries, real files, one temporary folder.

Every test of tests/e2e drives heddle the way a user does (the CLI, JSON output) and injects faults from
outside (signals, namespaces, full disks). Only the Python standard library is used.
"""

import json
import os
import random
import signal
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
BIN = os.environ.get("HEDDLE_BIN", os.path.join(ROOT, "build", "bin"))


class Failure(AssertionError):
    """What a check found, in words."""


def check(condition, message):
    if not condition:
        raise Failure(message)


def wait_until(what, predicate, timeout, interval=0.05):
    """Polls until predicate() is truthy; returns its value. Raises Failure naming `what`."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure(f"waited {timeout} s for: {what}")
        time.sleep(interval)


def processes():
    """(pid, argv, environment) of every process this user can read."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as f:
                state = f.read().rsplit(b")", 1)[1].split()[0]
            if state == b"Z":
                continue
            with open(f"/proc/{entry}/cmdline", "rb") as f:
                argv = f.read().split(b"\0")[:-1]
            with open(f"/proc/{entry}/environ", "rb") as f:
                env = dict(x.split(b"=", 1) for x in f.read().split(b"\0") if b"=" in x)
        except (OSError, IndexError):
            continue
        if argv:
            yield int(entry), [a.decode(errors="replace") for a in argv], env


class Cluster:
    """One coordinator and some workers started by `heddle up` in a folder of their own."""

    def __init__(self, workers=2, directory=None):
        self.dir = directory or tempfile.mkdtemp(prefix="heddle-e2e-")
        self.home = os.path.join(self.dir, "home")
        self.state = os.path.join(self.dir, "state")
        self.workers = workers
        self.env = dict(os.environ, HEDDLE_HOME=self.home, NO_COLOR="1")
        self.env.pop("HEDDLE_COORDINATOR", None)
        os.makedirs(self.home, exist_ok=True)

    # --- the CLI ---
    def heddle(self, *args, timeout=60, ok=True):
        """Runs one command; returns CompletedProcess. ok=True: a non-zero exit is a Failure."""
        done = subprocess.run([os.path.join(BIN, "heddle"), *map(str, args)], env=self.env, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.dir)
        if ok:
            check(done.returncode == 0,
                  f"heddle {' '.join(map(str, args))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def json(self, *args, timeout=60):
        return json.loads(self.heddle(*args, "-o", "json", timeout=timeout).stdout)

    def json_lines(self, *args, timeout=60):
        out = self.heddle(*args, "-o", "json", timeout=timeout).stdout
        return [json.loads(line) for line in out.splitlines() if line.strip()]

    def up(self):
        self.heddle("up", "--workers", self.workers, "--state", self.state, timeout=60)
        return self

    def down(self):
        self.heddle("down", timeout=120, ok=False)

    # --- jobs ---
    def submit(self, config, *overrides):
        return self.json("submit", config, *overrides)["id"]

    def job(self, job):
        return self.json("describe", job)

    def events(self, job):
        return self.json_lines("events", job)

    def series(self, job):
        """step -> (loss, batch_hash); a step repeated after a rollback counts once, the last one."""
        points = {}
        for point in self.json_lines("metrics", job):
            points[point["step"]] = (point["loss"], point["batch_hash"])
        return points

    def last_step(self, job):
        points = self.json_lines("metrics", job)
        return points[-1]["step"] if points else 0

    def wait_done(self, job, timeout):
        self.heddle("wait", job, "--timeout", f"{int(timeout)}s", timeout=timeout + 30, ok=False)
        return self.job(job)

    # --- processes of this cluster ---
    def find(self, program, need=None):
        """Pids of `program` that belong to this cluster (its folder stands in argv or environment)."""
        mark = self.dir
        found = []
        for pid, argv, env in processes():
            if os.path.basename(argv[0]) != program:
                continue
            words = argv + [v.decode(errors="replace") for v in env.values()]
            if any(mark in w for w in words) and (need is None or need(argv, env)):
                found.append(pid)
        return sorted(found)

    def ranks(self):
        return self.find("heddle-trainer")

    def all_processes(self):
        names = ("heddle-coordinator", "heddle-worker", "heddle-shim", "heddle-trainer")
        return {n: pids for n in names if (pids := self.find(n))}

    def kill_all(self):
        for _ in range(20):
            left = [p for pids in self.all_processes().values() for p in pids]
            if not left:
                return
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        try:
            if kind is None:
                self.down()
                left = wait_left(self, 15)
                check(not left, f"processes left behind after `heddle down`: {left}")
        finally:
            self.kill_all()
            if kind is None or not os.environ.get("HEDDLE_KEEP"):
                shutil.rmtree(self.dir, ignore_errors=True)
            else:
                print(f"kept {self.dir}", file=sys.stderr)


def wait_left(cluster, seconds):
    deadline = time.monotonic() + seconds
    while (left := cluster.all_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def corpus():
    """Real text that every Debian machine with Python has: sources of the standard library."""
    lib = sysconfig.get_paths()["stdlib"]
    names = ("json", "email", "http", "asyncio", "unittest", "logging", "xml")
    return [p for n in names if os.path.isdir(p := os.path.join(lib, n))]


def prepare_data(cluster, vocabulary=512, name="data"):
    out = os.path.join(cluster.dir, name)
    cluster.heddle("data", "prepare", "--input", *corpus(), "--tokenizer", f"bpe:{vocabulary}", "--out", out,
                   timeout=120)
    return out


CONFIG = """\
name: {name}
model:
  vocab_size: {vocabulary}
  d_model: 64
  n_layers: 2
  n_heads: 4
  n_kv_heads: 2
  head_dim: 16
  d_ffn: 128
  tie_embeddings: true
  max_position_embeddings: 128
  attention: {{kind: swa, swa: {{window: 32, sink_size: 4}}}}
training:
  max_steps: {steps}
  max_seq_len: 128
  micro_batch_size: 4
  learning_rate: 0.003
  warmup_steps: 20
  precision: fp32
  seed: 7
data: {{path: {data}}}
parallel: {{ranks: {ranks}, cpus_per_rank: 1, memory_per_rank: 1GiB}}
checkpoint: {{save_interval: {save}, keep_last: 3}}
schedule: {{max_restarts: 1000}}
"""


def write_config(cluster, data, name="e2e", steps=200, ranks=2, save=20, vocabulary=512, extra=""):
    path = os.path.join(cluster.dir, f"{name}.yaml")
    with open(path, "w") as f:
        f.write(CONFIG.format(name=name, steps=steps, ranks=ranks, save=save, data=data, vocabulary=vocabulary))
        f.write(extra)
    return path


def median(values):
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def seed_from(argv):
    """--seed N or a fresh one, printed so that a failure can be repeated."""
    seed = int(argv[argv.index("--seed") + 1]) if "--seed" in argv else random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}", flush=True)
    return seed


def main(test):
    """Runs test(argv); prints a Failure as one block; exit status for CTest."""
    try:
        test(sys.argv[1:])
    except Failure as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        sys.exit(1)


def skip(reason):
    """CTest reads 77 as skipped; the reason is printed for the summary."""
    print(f"SKIPPED: {reason}", flush=True)
    sys.exit(77)
