#!/usr/bin/env python3
"""The demo of heddle: real text, a small sparse model on two ranks, a kill -9, a resume, a sample.

Started by `./dev demo` after the build. Everything it makes lies in build/demo. Uses only the CLI.
usage: demo.py [--steps N] [--json FILE]
"""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
BIN = os.path.join(ROOT, "build", "bin")
WORK = os.path.join(ROOT, "build", "demo")
ENV = dict(os.environ, HEDDLE_HOME=os.path.join(WORK, "home"))
ENV.pop("HEDDLE_COORDINATOR", None)
BLOCKS = " .:-=+*#%@"


def say(text=""):
    print(text, flush=True)


def title(number, text):
    say(f"\n[{number}/6] {text}")


def heddle(*args, quiet=False, check=True):
    """Shows and runs one heddle command; returns its standard output."""
    if not quiet:
        say("$ heddle " + " ".join(args))
    done = subprocess.run([os.path.join(BIN, "heddle"), *args], env=ENV, cwd=WORK, text=True,
                          stdout=subprocess.PIPE, stderr=None if check else subprocess.PIPE)
    if check and done.returncode != 0:
        say(done.stdout)
        sys.exit(f"demo: `heddle {' '.join(args)}` failed with exit status {done.returncode}")
    return done.stdout


def series(job):
    """step -> metric point; of a step repeated after the kill the last one counts."""
    points = {}
    for line in heddle("metrics", job, "-o", "json", quiet=True, check=False).splitlines():
        try:
            point = json.loads(line)
        except ValueError:
            continue
        points[point["step"]] = point
    return points


def job_of(job):
    out = heddle("describe", job, "-o", "json", quiet=True, check=False)
    try:
        return json.loads(out)
    except ValueError:
        return None


def owner(pid):
    with open(f"/proc/{pid}/stat", "rb") as f:
        return int(f.read().rsplit(b")", 1)[1].split()[1])


def pids_of(program):
    """Processes of this demo: their argv or environment names its folder."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = open(f"/proc/{entry}/cmdline", "rb").read().split(b"\0")
            words = argv + open(f"/proc/{entry}/environ", "rb").read().split(b"\0")
        except OSError:
            continue
        if os.path.basename(argv[0].decode(errors="replace")) == program and any(WORK.encode() in w for w in words):
            yield int(entry)


def kill_one_worker():
    """kill -9 of one whole worker: the daemon, its shim and its rank, as when a machine loses power."""
    rank = min(pids_of("heddle-trainer"))
    shim = owner(rank)
    worker = max(pids_of("heddle-worker"))
    for candidate in pids_of("heddle-worker"):
        argv = open(f"/proc/{candidate}/cmdline", "rb").read().split(b"\0")
        state = next((argv[i + 1] for i, a in enumerate(argv) if a == b"--state"), b"")
        shim_words = open(f"/proc/{shim}/cmdline", "rb").read().split(b"\0")
        if state and any(state in w for w in shim_words):
            worker = candidate
    for pid in (worker, shim, rank):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return worker, shim, rank


def curve(values, width=72, height=12):
    """The loss curve as text."""
    steps = sorted(values)
    picked = [values[steps[i * (len(steps) - 1) // (width - 1)]] for i in range(width)]
    low, high = min(picked), max(picked)
    rows = []
    for row in range(height):
        level = high - (high - low) * row / (height - 1)
        cells = "".join("*" if abs(v - level) <= (high - low) / (2 * (height - 1)) else " " for v in picked)
        rows.append(f"{level:7.3f} |{cells}")
    rows.append(" " * 8 + "+" + "-" * width)
    rows.append(" " * 9 + f"step {steps[0]}" + f"step {steps[-1]}".rjust(width - len(f"step {steps[0]}")))
    return "\n".join(rows)


def svg(values, kill_step, width=760, height=320):
    steps = sorted(values)
    low, high = min(values.values()), max(values.values())
    x = lambda s: 60 + (width - 80) * (s - steps[0]) / max(1, steps[-1] - steps[0])
    y = lambda v: 20 + (height - 60) * (high - v) / max(1e-9, high - low)
    path = " ".join(f"{x(s):.1f},{y(values[s]):.1f}" for s in steps)
    ticks = "".join(f'<text x="8" y="{y(v):.0f}">{v:.2f}</text>' for v in (high, (high + low) / 2, low))
    ends = "".join(f'<text x="{x(s):.0f}" y="{height - 12}">{s}</text>' for s in (steps[0], steps[-1]))
    mark = f'<line x1="{x(kill_step):.0f}" x2="{x(kill_step):.0f}" y1="20" y2="{height - 40}" stroke="#c33"/>' \
           f'<text x="{x(kill_step) + 4:.0f}" y="32" fill="#c33">kill -9</text>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            f'font-size="12">{mark}<polyline fill="none" stroke="#247" stroke-width="1.5" points="{path}"/>'
            f'{ticks}{ends}</svg>')


def write_report(points, kill_step, prompt, sample, figures):
    folder = os.path.join(WORK, "report")
    os.makedirs(folder, exist_ok=True)
    losses = {s: p["loss"] for s, p in points.items()}
    picture = svg(losses, kill_step)
    with open(os.path.join(folder, "loss.svg"), "w") as f:
        f.write(picture)
    with open(os.path.join(folder, "report.json"), "w") as f:
        json.dump({**figures, "series": [points[s] for s in sorted(points)], "sample": prompt + sample}, f)
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in figures.items())
    path = os.path.join(folder, "index.html")
    with open(path, "w") as f:
        f.write("<!doctype html><meta charset=utf-8><title>heddle demo</title><style>body{font:14px sans-serif;"
                "max-width:800px;margin:2em auto}td{padding:2px 12px}pre{background:#eee;padding:1em}</style>"
                f"<h1>heddle demo</h1>{picture}<table>{rows}</table><h2>Sample</h2>"
                f"<pre>{html.escape(prompt)}<b>{html.escape(sample)}</b></pre>")
    return path


def train(steps, data):
    """Submits the run, kills a worker on the way, follows it to its end; returns (job, points, kill figures)."""
    job = json.loads(heddle("submit", os.path.join(HERE, "demo.yaml"), f"data.path={data}",
                            f"training.max_steps={steps}", "-o", "json"))["id"]
    say(f"job {job}")
    shown, killed, recovered = 0, None, None
    while True:
        time.sleep(0.5)
        points = series(job)
        body = job_of(job)
        last = max(points, default=0)
        if killed and not recovered and points and points[last]["attempt"] > killed["attempt"]:
            recovered = time.monotonic() - killed["at"]
            say(f"  recovered: attempt {points[last]['attempt']} steps again {recovered:.1f} s after the kill")
        if last >= shown + max(1, steps // 12):
            p = points[last]
            say(f"  step {last:5d}  loss {p['loss']:.4f}  lr {p['learning_rate']:.2e}  "
                f"{p['tokens_per_second']:.0f} tokens/s")
            shown = last
        if not killed and last >= steps * 0.4:
            killed = {"step": last, "attempt": points[last]["attempt"], "at": time.monotonic()}
            worker, shim, rank = kill_one_worker()
            say(f"  kill -9 of a whole worker at step {last}: daemon {worker}, shim {shim}, rank {rank}")
            heddle("up", "--workers", "2", "--state", os.path.join(WORK, "state"))
        if body and body["state"] == "DONE":
            if body["result"] != "SUCCEEDED":
                say(heddle("describe", job, check=False))
                sys.exit(f"demo: the job ended {body['result']}: {body.get('reason')}")
            return job, series(job), {**killed, "recovery_s": recovered}, body


def main(argv):
    steps = int(argv[argv.index("--steps") + 1]) if "--steps" in argv else 300
    start = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    try:
        title(1, "start a local cluster: one coordinator, two workers")
        heddle("up", "--workers", "2", "--state", os.path.join(WORK, "state"))
        say(heddle("node", "ls"))
        title(2, "prepare real text: the Python standard library on this machine")
        data = os.path.join(WORK, "data")
        say(heddle("data", "prepare", "--input", sysconfig.get_paths()["stdlib"], "--tokenizer", "bpe:4096",
                   "--out", data))
        title(3, "train a small sparse model on two ranks, and kill -9 one worker on the way")
        job, points, killed, body = train(steps, data)
        title(4, "the loss curve")
        losses = {s: p["loss"] for s, p in points.items()}
        say(curve(losses))
        first, last = losses[min(losses)], sum(losses[s] for s in sorted(losses)[-10:]) / 10
        say(f"loss {first:.3f} at the first step, {last:.3f} at the end: {first - last:.2f} nats lower")
        if first - last < 2:
            sys.exit("demo: the loss fell by less than 2 nats")
        title(5, "checkpoints and events")
        say(heddle("ckpt", "ls", job))
        say("\n".join(heddle("events", job).splitlines()[-14:]))
        title(6, "generate from the newest checkpoint")
        prompt = "def __init__(self"
        body_of = json.loads(heddle("generate", f"{job}@latest", "--prompt", prompt, "--max-new-tokens", "80",
                                    "--temperature", "0.7", "--top-k", "40", "--seed", "3", "-o", "json"))
        sample = body_of["text"]
        sample = sample[len(prompt):] if sample.startswith(prompt) else sample
        say(prompt + sample)
        figures = {"job": job, "steps": len(points), "first_loss": round(first, 4), "last_loss": round(last, 4),
                   "killed_at_step": killed["step"], "recovery_seconds": round(killed["recovery_s"] or 0, 2),
                   "attempts": len(body["attempts"]),
                   "tokens_per_second": round(points[max(points)]["tokens_per_second"]),
                   "demo_seconds": round(time.monotonic() - start, 1)}
        path = write_report(points, killed["step"], prompt, sample, figures)
        say("\n" + json.dumps(figures))
        say(f"report: {path}")
    finally:
        heddle("down", check=False)


main(sys.argv[1:])
