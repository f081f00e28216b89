#!/usr/bin/env python3
"""The optimizers against LibTorch's own on the same arrays, and against the memory's bandwidth in the same rounds.

ns a parameter of AdamW and Lion with fp32 and bf16 moments, with one thread and with all; the peers are at::_fused_adamw_
and torch::optim::AdamW of the same LibTorch. Bandwidth is the faster of two loops over the same arrays: one array scaled in
place, and AdamW's four streams with next to no arithmetic.
The contenders take turns with chunks of about a millisecond: the figures are medians over the chunks of all rounds.
usage: optimizer.py [--millions 64] [--rounds 20] [--quick]
"""

import os
import sys

from figures import BIN, Figures, median, quantile, rounded, run_json

QUICK = "--quick" in sys.argv
CORES = len(os.sched_getaffinity(0))
# product.md section 6: at equal bytes, and with bf16 moments. Those write no bf16 weights, as the peer does not.
TARGETS = {"adamw": 1.0, "adamw_bf16_moments": 1.35}
BANDWIDTH_SHARE = 0.9


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def measure(figures, threads):
    out, why = run_json([os.path.join(BIN, "bench_optimizer"), str(threads), option("--millions", "16" if QUICK else "64"),
                         option("--rounds", "4" if QUICK else "20")])
    if out is None:
        raise SystemExit(f"bench_optimizer: {why}")
    contenders = {name: value for name, value in out.items() if isinstance(value, dict)}
    time = {name: median(value["nanoseconds"]) for name, value in contenders.items()}
    rate = {name: value["bytes"] / time[name] for name, value in contenders.items()}  # bytes a ns: GB/s
    suffix = f"_{threads}_threads" if threads > 1 else "_1_thread"
    memory = ("memory_scale", "memory_mix")
    peers = {"fused_adamw": "at::_fused_adamw_", "torch_adamw": "torch::optim::AdamW"}
    bandwidth = max(rate[name] for name in memory)
    for name in memory:
        figures.add(name + suffix, rate[name], "GB/s", threads=threads, bytes_per_parameter=contenders[name]["bytes"])
    for name, contender in contenders.items():
        if name in memory:
            continue
        ordered = sorted(contender["nanoseconds"])
        ours = name not in peers and name != "gradient_norm"
        target = TARGETS.get(name)
        figures.add(name + suffix, time[name], "ns/parameter", target=f">= {target}x at::_fused_adamw_" if target else None,
                    peer=time["fused_adamw"] if ours else None, ratio=time["fused_adamw"] / time[name] if ours else None,
                    peer_name=peers["fused_adamw"] if ours else peers.get(name), threads=threads, chunks=len(ordered),
                    quartiles=rounded([quantile(ordered, 0.25), quantile(ordered, 0.75)], 3),
                    bytes_per_parameter=contender["bytes"], gigabytes_per_second=round(rate[name], 2),
                    against_torch_adamw=round(time["torch_adamw"] / time[name], 2) if ours else None)
        if target:
            figures.add(f"{name}{suffix}_share_of_bandwidth", rate[name] / bandwidth, "of 1",
                        target=f">= {BANDWIDTH_SHARE}" if name == "adamw" else None, threads=threads,
                        bandwidth=round(bandwidth, 2), share_of_its_own_streams=round(rate[name] / rate["memory_mix"], 3))


def main():
    figures = Figures("optimizer")
    try:
        for threads in sorted({1, CORES}):
            measure(figures, threads)
    finally:
        figures.write()


if __name__ == "__main__":
    main()
