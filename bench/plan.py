#!/usr/bin/env python3
"""How near `heddle plan` comes: its seconds of forward and backward against those of a step of the same run, same threads.

In turns, each with figures of the host measured right before: on a machine that does other work both sides meet it.
usage: plan.py [--quick] [--presets tiny-dense,...] [--lengths 512,2048] [--precisions bf16,fp32]
"""

import json
import os
import subprocess
import sys
import tempfile

from figures import BIN, Figures, median, rounded, run_json

QUICK = "--quick" in sys.argv
CORES = len(os.sched_getaffinity(0))


def option(name, default):
    return (sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default).split(",")


def predicted(home, preset, length, precision):
    """Seconds of one micro-batch that `heddle plan` says, without the optimizer."""
    config = os.path.join(home, "run.yaml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"defaults: [model: {preset}]\ndata: {{path: none}}\n")
    words = [config, f"training.max_seq_len={length}", "training.micro_batch_size=1", f"training.precision={precision}",
             f"parallel.cpus_per_rank={CORES}", "-o", "json"]
    done = subprocess.run([os.path.join(BIN, "heddle"), "plan", *words], check=True, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL, env={**os.environ, "HEDDLE_HOME": home})
    return json.loads(done.stdout)["throughput"]["compute_seconds"]


def measured(preset, length, precision):
    out, why = run_json([os.path.join(BIN, "bench_model_step"), preset, str(length), "3" if QUICK else "7", precision])
    if out is None:
        raise SystemExit(f"bench_model_step {preset}: {why}")
    return out["seconds"]


def compare(figures, cases):
    pairs = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as home:
        for _ in range(1 if QUICK else 3):
            for preset, length, precision in cases:
                host = [os.path.join(BIN, "heddle-model"), "bench-host", "--dir", home, "--out", os.path.join(home, "host_bench.json")]
                subprocess.run(host, check=True, stdout=subprocess.DEVNULL)
                said = predicted(home, preset, length, precision)
                pairs[preset, length, precision].append((said, measured(preset, length, precision)))
    for (preset, length, precision), runs in pairs.items():
        figures.add(f"{preset}_{length}_{precision}_predicted_to_measured", median([said / took for said, took in runs]), "of 1",
                    target="0.75 to 1.25", predicted_seconds=rounded([said for said, _ in runs], 4),
                    measured_seconds=rounded([took for _, took in runs], 4))


def main():
    figures = Figures("plan")
    cases = [(preset, int(length), precision) for preset in option("--presets", "tiny-dense,small-dense")
             for length in option("--lengths", "512,2048") for precision in option("--precisions", "bf16,fp32")]
    compare(figures, cases)
    figures.write()


if __name__ == "__main__":
    main()
