"""Figures of a benchmark: one JSON line each, with device, commit and the ratio to the peer of the same run."""

import json
import os
import platform
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
BIN = os.environ.get("HEDDLE_BIN", os.path.join(ROOT, "build", "bin"))


def device():
    model, flags = platform.machine(), ""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() == "flags":
                flags = value.split()
                break
    with open("/proc/meminfo", encoding="utf-8") as file:
        memory = int(file.readline().split()[1]) // 1024
    isa = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return {"cpu": model, "cores": os.cpu_count(), "isa": isa, "memory_mib": memory, "kernel": ".".join(platform.release().split(".")[:2])}


def commit():
    def git(*args):
        return subprocess.run(["git", "-C", ROOT, *args], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")


class Figures:
    """Collects the figures of one benchmark and writes bench/results/NAME.jsonl at the end.

    Each line has the load average when it was made: on a machine that does other work, times mean little and ratios more.
    """

    def __init__(self, name):
        self.name = name
        self.common = {"bench": name, "device": device(), "commit": commit()}
        self.lines = []

    def add(self, figure, value, unit, target=None, peer=None, ratio=None, **more):
        """`target` is text such as "<= 40"; `peer` its own figure; `ratio` ours to the peer's, > 1 = better."""
        line = {"figure": figure, "value": value, "unit": unit, "target": target, "peer": peer, "ratio": ratio,
                "load_average": round(os.getloadavg()[0], 2), **more}
        self.lines.append(line)
        shown = "none" if value is None else f"{value:.4g}"
        ends = "".join([f"  (target {target})" if target else "", f"  {ratio:.2f}x the peer" if ratio else ""])
        print(f"{figure:48} {shown:>10} {unit}{ends}", flush=True)

    def write(self):
        folder = os.path.join(HERE, "results")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{self.name}.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for line in self.lines:
                file.write(json.dumps({**self.common, **line}) + "\n")
        print(f"{len(self.lines)} figures in {os.path.relpath(path, ROOT)}")


def median(values):
    return statistics.median(values) if values else None


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def rounded(values, digits=2):
    return [round(v, digits) for v in values]


def peer_python():
    """Interpreter of the peers' virtual environment; made on first use. None, with the reason, where that fails."""
    folder = os.environ.get("HEDDLE_PEERS", os.path.expanduser("~/.cache/heddle/peers"))
    python = os.path.join(folder, "bin", "python")
    requirements = os.path.join(HERE, "peers", "requirements.txt")
    check = "import torch, tokenizers, safetensors, numpy"
    if os.path.exists(python) and subprocess.run([python, "-c", check], check=False, capture_output=True).returncode == 0:
        return python, ""
    print("installing the peers' packages (once) ...", flush=True)
    for command in ([sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", "-q", "-r", requirements]):
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except OSError as error:
            return None, f"{command[0]}: {error}"
        if done.returncode != 0:
            return None, (done.stderr.strip().splitlines() or ["failed"])[-1]
    return python, ""


def run_json(command, timeout=1800):
    """Runs a program that prints one JSON line. Returns (object, "") or (None, reason)."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def matmul_peak(python, threads, precision="bf16"):
    """GFLOP/s of a 2048 cube in the peers' torch: the roof of a training rate."""
    dtype = "bfloat16" if precision == "bf16" else "float32"
    program = (f"import torch,time,json;torch.set_num_threads({threads});a=torch.randn(2048,2048).to(torch.{dtype});"
               "b=a.clone();[a@b for _ in range(3)];t=time.perf_counter();[a@b for _ in range(10)];"
               "print(json.dumps({'gflops':10*2*2048**3/(time.perf_counter()-t)/1e9}))")
    out, _ = run_json([python, "-c", program])
    return out["gflops"] if out else None
