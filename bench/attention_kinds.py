#!/usr/bin/env python3
"""Every attention kind trained alike: 300 steps of its tiny preset on the Python standard library's sources.

Prints and records the loss at the end against tiny-dense's of the same run (within 5 %), the rate against dense, and for
DSA and GSA how much of the attention's mass the trained indexer's selection holds against a random one's. The curves of
all kinds are one file, bench/results/attention_kinds_curves.jsonl. usage: attention_kinds.py [--steps N] [--kinds a,b]
"""

import json
import os
import statistics
import subprocess
import sys

from figures import BIN, HERE, ROOT, Figures

sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
from faultlab.cluster import Cluster, corpus  # noqa: E402

KINDS = ["dense", "swa", "nsa", "dsa", "gsa", "mla", "swa-mla", "moe"]
INDEXED = {"dsa": 0, "gsa": 0}
TAIL = 20  # steps averaged at the end: one batch's loss is noise
THREADS = len(os.sched_getaffinity(0))


def argument(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def run_kind(cluster, data, kind, steps):
    """Trains one kind; returns its metric points and the job."""
    config = os.path.join(cluster.dir, f"{kind}.yaml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"defaults: [model: tiny-{kind}, training: tiny]\nname: tiny-{kind}\n"
                   f"data: {{path: {data}}}\nparallel: {{ranks: 1, cpus_per_rank: {THREADS}, memory_per_rank: 4GiB}}\n"
                   "checkpoint: {save_interval: 1000000}\n")
    overrides = [f"training.max_steps={steps}"]
    if kind in INDEXED:
        # A third of the steps train the indexer on dense attention, the rest run sparse.
        overrides.append(f"model.attention.{kind}.warmup_steps={steps // 3}")
    job = cluster.submit(config, *overrides)
    end = cluster.wait_done(job, 3600)
    if end["result"] != "SUCCEEDED":
        raise SystemExit(f"tiny-{kind}: {end['state']} {end.get('result')} {end.get('reason')}")
    points = {p["step"]: p for p in cluster.json_lines("metrics", job)}
    return job, [points[s] for s in sorted(points)]


def recall(cluster, job, data):
    """Attention mass in the selection of the trained indexer and in a random one of the same size."""
    done = cluster.heddle("model", "recall", f"{job}@latest", "--data", data, "--tokens", "4096", "-o", "json", timeout=600)
    return json.loads(done.stdout)


def write(figures, curves):
    figures.write()
    with open(os.path.join(HERE, "results", "attention_kinds_curves.jsonl"), "w", encoding="utf-8") as file:
        for line in curves:
            file.write(json.dumps(line) + "\n")


def main():
    steps = int(argument("--steps", 300))
    kinds = argument("--kinds", ",".join(KINDS)).split(",")
    if unknown := [k for k in kinds if k not in KINDS]:
        raise SystemExit(f"no kind {unknown[0]}; there are: {' '.join(KINDS)}")
    figures = Figures("attention_kinds")
    curves = []
    with Cluster(workers=1) as cluster:
        data = os.path.join(cluster.dir, "data")
        cluster.heddle("data", "prepare", "--input", *corpus(), "--tokenizer", "bpe:8192", "--out", data, timeout=300)
        cluster.up()
        dense = None
        for kind in kinds:
            job, points = run_kind(cluster, data, kind, steps)
            loss = statistics.mean(p["loss"] for p in points[-TAIL:])
            rate = statistics.median(p["tokens_per_second"] for p in points[-TAIL:])
            if kind == "dense":
                dense = (loss, rate)
            against = {"loss_of_dense": round(dense[0], 4), "loss_above_dense_percent": round(100 * (loss / dense[0] - 1), 2)} if dense else {}
            figures.add(f"loss_tiny_{kind}", loss, "nats", target="<= 1.05x dense" if dense else None,
                        first_loss=points[0]["loss"], steps=steps, **against)
            figures.add(f"tokens_per_second_tiny_{kind}", rate, "tokens/s", peer=dense[1] if dense else None,
                        ratio=rate / dense[1] if dense else None)
            if kind in INDEXED:
                found = recall(cluster, job, data)
                figures.add(f"recall_tiny_{kind}", found["recall"], "of the attention's mass", peer=found["random"],
                            ratio=found["recall"] / found["random"], keys=found["keys_mean"], layers=found["layers"])
            curves += [{"kind": kind, **{k: p[k] for k in ("step", "loss", "indexer_loss", "balance_loss", "tokens_per_second")
                                         if p.get(k) is not None}} for p in points]
            write(figures, curves)  # a run takes long: what is there stays if it is ended


main()
