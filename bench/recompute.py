#!/usr/bin/env python3
"""What `training.gradient_checkpointing` costs and saves: forward and backward of one micro-batch with none, selective and full.

In turns, each run a process of its own, so that the peak is its own. Memory is what the step needs beside parameters and
gradients. The loss must be the same.
usage: recompute.py [--quick] [--presets tiny-dense,...] [--length 2048] [--precisions bf16,fp32]
"""

import os
import sys

from figures import BIN, Figures, median, rounded, run_json

QUICK = "--quick" in sys.argv


def option(name, default):
    return (sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default).split(",")


def measure(figures, preset, length, precision):
    runs = {"none": [], "selective": [], "full": []}
    for _ in range(1 if QUICK else 3):
        for recompute, outs in runs.items():
            out, why = run_json([os.path.join(BIN, "bench_model_step"), preset, length, "3" if QUICK else "5", precision, recompute])
            if out is None:
                raise SystemExit(f"bench_model_step {preset} {recompute}: {why}")
            outs.append(out)
    losses = {out["loss"] for outs in runs.values() for out in outs}
    if len(losses) != 1:
        raise SystemExit(f"{preset} {precision}: the losses differ: {losses}")
    keeping = runs["none"]
    for recompute, outs in runs.items():
        rates = [out["tokens_per_second"] for out in outs]
        peak = median([out["peak_bytes"] for out in outs])
        figures.add(f"{preset}_{length}_{precision}_{recompute}", median(rates), "tokens/s",
                    peer=median([out["tokens_per_second"] for out in keeping]), peer_name="our none",
                    ratio=median([rate / out["tokens_per_second"] for rate, out in zip(rates, keeping)]), runs=rounded(rates, 1),
                    peak_mib=round(peak / 2**20, 1),
                    peak_against_none=round(peak / median([out["peak_bytes"] for out in keeping]), 3))


def main():
    figures = Figures("recompute")
    try:
        for preset in option("--presets", "tiny-dense,small-dense,tiny-nsa,tiny-gsa,tiny-mla,tiny-moe"):
            for precision in option("--precisions", "bf16,fp32"):
                measure(figures, preset, option("--length", "2048")[0], precision)
    finally:
        figures.write()


if __name__ == "__main__":
    main()
