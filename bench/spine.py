#!/usr/bin/env python3
"""The spine: what a user waits for between submit and the first step, and how fast the step is.

Figures against product.md section 6. Everything runs on one embedded cluster of this machine; the peer of the training
rate runs in turns with ours. usage: spine.py [--quick]
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime

from figures import BIN, HERE, ROOT, Figures, matmul_peak, median, peer_python, quantile, rounded, run_json

sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
from faultlab.cluster import Cluster, corpus  # noqa: E402

QUICK = "--quick" in sys.argv
THREADS = os.cpu_count() or 1
PEER = os.path.join(HERE, "peers", "pytorch_dense.py")
# tiny-dense (attention-and-moe.md section 11), written out so that the peer reads the same file.
MODEL = {"vocab_size": 8192, "d_model": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "d_ffn": 688,
         "norm_eps": 1e-6, "tie_embeddings": True, "max_position_embeddings": 512, "rope": {"theta": 10000.0},
         "attention": {"kind": "dense"}}
PARAMETERS = 4_999_424
WARMUP = 3


def train_config(cluster, data, name, steps, precision="bf16"):
    """The run configuration as JSON, which is YAML too."""
    config = {"name": name, "model": MODEL,
              "training": {"max_steps": steps, "max_seq_len": 512, "micro_batch_size": 8, "learning_rate": 0.001,
                           "warmup_steps": 2, "precision": precision, "seed": 7},
              "data": {"path": data},
              "parallel": {"ranks": 1, "cpus_per_rank": THREADS, "memory_per_rank": "2GiB"},
              "checkpoint": {"save_interval": 1_000_000}}
    path = os.path.join(cluster.dir, f"{name}.yaml")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    return path


def memory_kib(pid, key):
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return 0


def bench_version(figures):
    command = [os.path.join(BIN, "heddle"), "version"]
    times = []
    for _ in range(5 if QUICK else 30):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - start) * 1000)
    figures.add("heddle_version", median(times), "ms", target="<= 30", p99=round(quantile(times, 0.99), 2))


def bench_memory(figures, cluster):
    time.sleep(5)  # what start-up needed is given back, heartbeats run
    for program, target in (("heddle-coordinator", 40), ("heddle-worker", 30)):
        pids = cluster.find(program)
        rss = [memory_kib(pid, "Rss") * 1024 / 1e6 for pid in pids]
        private = [(memory_kib(pid, "Private_Clean") + memory_kib(pid, "Private_Dirty")) * 1024 / 1e6 for pid in pids]
        figures.add(f"idle_rss_{program.removeprefix('heddle-')}", max(rss, default=None), "MB", target=f"<= {target}",
                    processes=rounded(rss), private_mb=rounded(private))


def bench_submit(figures, cluster):
    load = os.path.join(BIN, "bench_submit_load")
    endpoint = f"unix:{cluster.state}/coordinator.sock"
    one, why = run_json([load, endpoint, "1", "50" if QUICK else "500", f"one-{time.time_ns()}"])
    if one is None:
        raise SystemExit(f"bench_submit_load: {why}")
    figures.add("submit_acknowledged_p50", one["p50_ms"], "ms", clients=1, submits=one["submits"])
    figures.add("submit_acknowledged_p99", one["p99_ms"], "ms", clients=1, max_ms=one["max_ms"])
    runs = []
    for clients in (64, 128):
        run, why = run_json([load, endpoint, str(clients), "10" if QUICK else "150", f"many-{clients}-{time.time_ns()}"])
        if run is None:
            raise SystemExit(f"bench_submit_load: {why}")
        runs.append(run)
    best = max(runs, key=lambda run: run["submits_per_second"])
    lost = sum(run["submits"] - run["distinct_ids"] for run in runs)
    figures.add("durable_submits_per_second", best["submits_per_second"], "1/s", target=">= 5000", runs=runs,
                peer_name="Slurm of Debian 12, not run here (176-371/s measured for product.md)")
    figures.add("durable_submits_p99", best["p99_ms"], "ms", target="<= 25", clients=best["clients"])
    figures.add("submits_without_an_id_of_their_own", lost, "jobs", target="0")


def bench_cli_submit(figures, cluster):
    path = os.path.join(cluster.dir, "held.yaml")
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"name": "held", "kind": "command", "command": {"argv": ["/bin/true"]}}, file)
    times = []
    for _ in range(5 if QUICK else 30):
        start = time.perf_counter()
        cluster.heddle("submit", path, "--hold")
        times.append((time.perf_counter() - start) * 1000)
    figures.add("heddle_submit_command_p50", median(times), "ms", p99=round(quantile(times, 0.99), 2))


def first_log_ms(cluster, job, text):
    """When the trainer's log says `text`, in ms since 1970."""
    for line in cluster.heddle("logs", job, "--rank", "0", ok=False).stdout.splitlines():
        stamp = re.search(r"(\d{4}-\d\d-\d\dT[\d:.]+)Z", line)
        if stamp and text in line:
            return datetime.fromisoformat(stamp.group(1) + "+00:00").timestamp() * 1000
    return None


def bench_start(figures, cluster, data):
    """Submit to the trainer's first instruction, which it logs itself, on an idle cluster."""
    config = train_config(cluster, data, "start", 1)
    to_main, to_end = [], []
    for _ in range(3 if QUICK else 11):
        start = time.time() * 1000
        job = cluster.submit(config)
        submitted = time.time() * 1000
        done = cluster.wait_done(job, 120)
        if done["result"] != "SUCCEEDED":
            raise SystemExit(f"job {job} ended {done['state']} {done.get('result')}: {done.get('reason')}")
        to_end.append(time.time() * 1000 - start)
        started = first_log_ms(cluster, job, "rank started")
        if started is not None:
            to_main.append(started - start)
        figures_cli = submitted - start
    figures.add("submit_to_trainer_main_p50", median(to_main), "ms", target="<= 300", runs=rounded(to_main, 1),
                of_it_cli_ms=round(figures_cli, 1), clock="wall, ms resolution; from before the CLI starts")
    figures.add("submit_to_job_done_one_step_p50", median(to_end), "ms", runs=rounded(to_end, 1))


def our_rate(cluster, data, name, steps):
    job = cluster.submit(train_config(cluster, data, name, WARMUP + steps))
    done = cluster.wait_done(job, 1200)
    points = sorted(cluster.json_lines("metrics", job), key=lambda point: point["step"])
    if done["result"] != "SUCCEEDED" or len(points) < WARMUP + steps:
        raise SystemExit(f"job {job} ended {done['state']} {done['result']} after {len(points)} steps")
    picked = points[WARMUP:]
    return [p["tokens_per_second"] for p in picked], points[0]["loss"], points[-1]["loss"]


def bench_training(figures, cluster, data):
    steps = 3 if QUICK else 12
    python, why = peer_python()
    ours, peers, ratios, losses, peaks = [], [], [], [], []
    for turn in range(1 if QUICK else 3):
        rates, first, last = our_rate(cluster, data, f"rate-{turn}", steps)
        ours.append(median(rates))
        losses.append((round(first, 3), round(last, 3)))
        if python is None:
            continue
        config = train_config(cluster, data, f"rate-{turn}", steps)
        peer, why = run_json([python, PEER, "--config", config, "--data", data, "--steps", str(steps), "--warmup",
                              str(WARMUP), "--threads", str(THREADS)])
        if peer is not None:
            peers.append(median(peer["tokens_per_second"]))
            ratios.append(ours[-1] / peers[-1])
            peaks.append(matmul_peak(python, THREADS))
    # 6 FLOPs a parameter a token; attention at 512 tokens adds 3 % and is left out.
    share = [6 * PARAMETERS * o / (p * 1e9) for o, p in zip(ours, peaks) if p]
    figures.add("tiny_dense_tokens_per_second", median(ours), "tokens/s", target=">= 2.5x eager", peer=median(peers),
                ratio=median(ratios), runs=rounded(ours, 1), peer_runs=rounded(peers, 1), threads=THREADS, losses=losses,
                precision="bf16", peer_name="PyTorch 2.11.0 eager, fused AdamW, causal SDPA", peer_missing=why or None)
    figures.add("tiny_dense_share_of_matmul_peak", median(share), "of 1", target=">= 0.40", peak_gflops=rounded(peaks, 1))


def main():
    figures = Figures("spine")
    try:
        run(figures)
    finally:
        figures.write()  # what there is, should a later part fail


def run(figures):
    bench_version(figures)
    folder = tempfile.mkdtemp(prefix="heddle-bench-")
    with Cluster(workers=1, directory=folder) as cluster:  # one worker with every core
        data = os.path.join(cluster.dir, "data")
        start = time.perf_counter()
        cluster.heddle("data", "prepare", "--input", *corpus(), "--tokenizer", "bpe:8192", "--out", data, timeout=300)
        figures.add("data_prepare_demo_corpus", time.perf_counter() - start, "s")
        cluster.up()
        bench_memory(figures, cluster)
        bench_start(figures, cluster, data)
        bench_training(figures, cluster, data)
        bench_cli_submit(figures, cluster)
        bench_submit(figures, cluster)


if __name__ == "__main__":
    main()
