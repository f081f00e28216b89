#!/usr/bin/env python3
"""The optimizers against LibTorch's own on the same arrays, and against the memory's bandwidth in the same rounds.

ns a parameter of AdamW and Lion with fp32 and bf16 moments, with one thread and with all; the peers are at::_fused_adamw_
and torch::optim::AdamW of the same LibTorch. Bandwidth is the faster of two loops over the same arrays: one array scaled in
place, and AdamW's four streams with next to no arithmetic.
usage: optimizer.py [--millions 64] [--rounds 9] [--quick]
"""

import os
import sys

from figures import BIN, Figures, median, rounded, run_json

QUICK = "--quick" in sys.argv
CORES = len(os.sched_getaffinity(0))
# product.md section 6: at equal bytes, and with bf16 moments. Those write no bf16 weights, as the peer does not.
TARGETS = {"adamw": 1.0, "adamw_bf16_moments": 1.35}
BANDWIDTH_SHARE = 0.9


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def ratio(slower, faster):
    """Median over the rounds: a round's contenders ran one after the other."""
    return median([a / b for a, b in zip(slower["seconds"], faster["seconds"])])


def measure(figures, threads):
    out, why = run_json([os.path.join(BIN, "bench_optimizer"), str(threads), option("--millions", "16" if QUICK else "64"),
                         option("--rounds", "4" if QUICK else "9")])
    if out is None:
        raise SystemExit(f"bench_optimizer: {why}")
    size = out["parameters"]
    suffix = f"_{threads}_threads" if threads > 1 else "_1_thread"

    def rates(contender):
        return [contender["bytes"] * size / seconds / 1e9 for seconds in contender["seconds"]]

    memory = {name: out[name] for name in ("memory_scale", "memory_mix")}
    bandwidth = max(median(rates(contender)) for contender in memory.values())
    for name, contender in memory.items():
        figures.add(name + suffix, median(rates(contender)), "GB/s", runs=rounded(rates(contender), 1), threads=threads)
    peers = {"fused_adamw": "at::_fused_adamw_", "torch_adamw": "torch::optim::AdamW"}
    for name, contender in out.items():
        if not isinstance(contender, dict) or name in memory:
            continue
        seconds = [s / size * 1e9 for s in contender["seconds"]]
        ours = name not in peers and name != "gradient_norm"
        target = TARGETS.get(name)
        figures.add(name + suffix, median(seconds), "ns/parameter", target=f">= {target}x at::_fused_adamw_" if target else None,
                    peer=median([s / size * 1e9 for s in out["fused_adamw"]["seconds"]]) if ours else None,
                    ratio=ratio(out["fused_adamw"], contender) if ours else None,
                    peer_name=peers["fused_adamw"] if ours else peers.get(name), runs=rounded(seconds, 3), threads=threads,
                    bytes_per_parameter=contender["bytes"], gigabytes_per_second=round(median(rates(contender)), 2),
                    against_torch_adamw=round(ratio(out["torch_adamw"], contender), 2) if ours else None)
        if name in TARGETS:
            figures.add(f"{name}{suffix}_share_of_bandwidth", median(rates(contender)) / bandwidth, "of 1",
                        target=f">= {BANDWIDTH_SHARE}" if name == "adamw" else None, threads=threads,
                        bandwidth=round(bandwidth, 2))


def main():
    figures = Figures("optimizer")
    try:
        for threads in sorted({1, CORES}):
            measure(figures, threads)
    finally:
        figures.write()


if __name__ == "__main__":
    main()
