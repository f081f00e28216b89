#!/usr/bin/env python3
"""Dense training against PyTorch: eager, torch.compile, DDP and FSDP2 with the same wheel, threads and batches, in turns.

tiny-dense and small-dense at 512 and 2048 tokens: tokens/s of one process with every core, and its share of the matmul
peak measured in the same run; of two ranks with one thread each, `parallel.shard` none, optimizer and full.
usage: training.py [--quick] [--presets tiny,small] [--lengths 512,2048] [--precisions bf16,fp32] [--no-compile]
"""

import json
import os
import sys
import tempfile

from figures import HERE, ROOT, Figures, matmul_peak, median, peer_python, rounded, run_json

sys.path.insert(0, os.path.join(ROOT, "tests", "support"))
from faultlab.cluster import Cluster, corpus  # noqa: E402

QUICK = "--quick" in sys.argv
CORES = len(os.sched_getaffinity(0))
PEER = os.path.join(HERE, "peers", "pytorch_dense.py")
PARAMETERS = {"tiny": 4_999_424, "small": 30_548_480}
WIDTHS = {"tiny": (4, 256), "small": (8, 512)}  # layers, width of all query heads
TOKENS = 4096  # of a step and process
WARMUP, STEPS = 2, 3 if QUICK else 5
# product.md section 6, of one process in bf16.
TARGETS = {"tiny": (0.40, 2.5, 1.6), "small": (0.50, 1.8, 1.3)}


def option(name, default):
    return (sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default).split(",")


class Run:
    """One configuration: ours as a job of the cluster, the peers' with the same resolved file."""

    def __init__(self, cluster, data, preset, length, precision, ranks):
        self.cluster, self.data, self.ranks = cluster, data, ranks
        self.threads = CORES if ranks == 1 else max(1, CORES // ranks)
        self.name = f"{preset}_{length}_{precision}" + (f"_{ranks}_ranks" if ranks > 1 else "")
        self.path = os.path.join(cluster.dir, f"{self.name}.yaml")
        with open(self.path, "w", encoding="utf-8") as file:
            file.write(f"defaults: [model: {preset}-dense]\nname: {self.name}\ndata: {{path: {data}}}\n"
                       f"training: {{max_steps: {WARMUP + STEPS}, max_seq_len: {length}, "
                       f"micro_batch_size: {TOKENS // length}, learning_rate: 0.001, warmup_steps: 2, "
                       f"precision: {precision}}}\n"
                       f"parallel: {{ranks: {ranks}, cpus_per_rank: {self.threads}}}\n"
                       "checkpoint: {save_interval: 1000000}\n")

    def ours(self, shard="none"):
        job = self.cluster.submit(self.path, f"parallel.shard={shard}")
        done = self.cluster.wait_done(job, 1800)
        if done["result"] != "SUCCEEDED":
            raise SystemExit(f"{self.name} {shard}: {done['state']} {done.get('result')} {done.get('reason')}")
        points = sorted(self.cluster.json_lines("metrics", job), key=lambda point: point["step"])
        return median([point["tokens_per_second"] for point in points[WARMUP:]])

    def peer(self, python, *extra):
        resolved = self.path + ".json"
        with open(resolved, "w", encoding="utf-8") as file:
            file.write(self.cluster.heddle("config", "show", self.path, "-o", "json").stdout)
        out, why = run_json([python, PEER, "--config", resolved, "--data", self.data, "--steps", str(STEPS), "--warmup",
                             str(WARMUP), "--threads", str(self.threads), "--ranks", str(self.ranks), *extra])
        if out is None:
            print(f"{self.name} {' '.join(extra)}: no peer: {why}", flush=True)
        return median(out["tokens_per_second"]) if out else None


def flops_per_token(preset, length):
    """6 a parameter; attention's two products, forward and backward, over half of the square."""
    layers, width = WIDTHS[preset]
    return 6 * PARAMETERS[preset] + 6 * layers * width * length


def one_process(figures, cluster, data, python, preset, length, precision):
    run = Run(cluster, data, preset, length, precision, 1)
    rates, eager, peaks = [], [], []
    for _ in range(1 if QUICK else 2):
        rates.append(run.ours())
        if python:
            eager.append(run.peer(python))
            peaks.append(matmul_peak(python, CORES, precision))
    ours, peer = median(rates), median([e for e in eager if e])
    share, over_eager, over_compiled = TARGETS[preset]
    figures.add(f"{run.name}_tokens_per_second", ours, "tokens/s", target=f">= {over_eager}x eager" if precision == "bf16" else None,
                peer=peer, ratio=peer and ours / peer, runs=rounded(rates, 1), peer_name="PyTorch eager")
    peak = median([p for p in peaks if p])
    if peak:
        figures.add(f"{run.name}_share_of_matmul_peak", flops_per_token(preset, length) * ours / (peak * 1e9), "of 1",
                    target=f">= {share}" if precision == "bf16" else None, peak_gflops=round(peak, 1),
                    peer=peer and flops_per_token(preset, length) * peer / (peak * 1e9))
    if python and precision == "bf16" and "--no-compile" not in sys.argv:
        compiled = run.peer(python, "--compile")
        if compiled:
            figures.add(f"{run.name}_against_compiled", ours, "tokens/s", target=f">= {over_compiled}x compiled", peer=compiled,
                        ratio=ours / compiled, peer_name="torch.compile")


def two_ranks(figures, cluster, data, python, preset, length):
    run = Run(cluster, data, preset, length, "bf16", 2)
    none, optimizer, full = run.ours("none"), run.ours("optimizer"), run.ours("full")
    ddp = run.peer(python, "--parallel", "ddp") if python else None
    fsdp = run.peer(python, "--parallel", "fsdp2") if python else None
    figures.add(f"{run.name}_none", none, "tokens/s", target=">= 1.7x DDP", peer=ddp, ratio=ddp and none / ddp, peer_name="DDP")
    figures.add(f"{run.name}_optimizer", optimizer, "tokens/s", peer=none, ratio=optimizer / none, peer_name="our none")
    figures.add(f"{run.name}_full", full, "tokens/s", target=">= 2.5x FSDP2", peer=fsdp, ratio=fsdp and full / fsdp,
                peer_name="FSDP2")
    figures.add(f"{run.name}_full_against_none", full, "tokens/s", target=">= 0.9x", peer=none, ratio=full / none,
                peer_name="our none")


def main():
    python, why = peer_python()
    if python is None:
        print(f"no peers: {why}")
    figures = Figures("training")
    try:
        with Cluster(workers=1, directory=tempfile.mkdtemp(prefix="heddle-bench-")) as cluster:
            data = os.path.join(cluster.dir, "data")
            cluster.heddle("data", "prepare", "--input", *corpus(), "--tokenizer", "bpe:8192", "--out", data, timeout=300)
            cluster.up()
            for preset in option("--presets", "tiny,small"):
                for length in map(int, option("--lengths", "512,2048")):
                    for precision in option("--precisions", "bf16,fp32"):
                        one_process(figures, cluster, data, python, preset, length, precision)
                    two_ranks(figures, cluster, data, python, preset, length)
    finally:
        figures.write()


if __name__ == "__main__":
    main()
