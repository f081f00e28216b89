#!/usr/bin/env python3
"""Experts on a CPU: their matrix products by rows per expert, and training steps with experts in memory, elsewhere and on disk.

Products: GFLOP/s of one thread in processor time, forward, input gradient and weight gradient of both matrices of every expert;
the peers, at::_grouped_mm, a loop of at::mm, and our own pieces through LibTorch's mm, take turns with ours on the same
arrays. Steps: tokens/s and ns a parameter of the update (norm included), experts resident, in a host arena and spilled, in
turns; all losses must have the same bits. Spilled runs carry what the set moved and waited beside what runtime 4 (6) says: the
longer one of the streams of reads and writes, at the disk's rates of the same run.
usage: experts.py [--quick] [--seconds 1] [--turns 2] [--tokens 1024] [--spill DIR]
"""

import os
import sys
import tempfile

from figures import BIN, Figures, median, quantile, rounded, run_json

QUICK = "--quick" in sys.argv
ROWS = (4, 256) if QUICK else (1, 4, 16, 64, 256, 1024)
SHAPES = ((512, 1024), (256, 172))  # the second one is an expert of tiny-moe
PEERS = {"grouped": "at::_grouped_mm", "loop": "at::mm, one expert after the other", "library": "our pieces through at::mm"}
# name: percent of the experts' memory (0: not offloaded), whether the rest is spilled
PLACES = {"resident": (0, False), "arena_100": (100, False), "arena_50": (50, False), "spill_50": (50, True),
          "spill_10": (10, True)}


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def run(command):
    out, why = run_json(command)
    if out is None:
        raise SystemExit(f"{' '.join(command)}: {why}")
    return out


def measure_products(figures, width, hidden, experts, rows):
    sizes = [str(n) for n in (width, hidden, experts, rows)]
    out = run([os.path.join(BIN, "bench_experts"), *sizes, "1", option("--seconds", "1")])
    for product in ("forward", "input_gradient", "weight_gradient"):
        rates = {name: out.get(f"{name}/{product}") for name in ("kernels", *PEERS)}
        ours = median(rates["kernels"])
        peers = {PEERS[name]: median(rates[name]) for name in PEERS if rates[name]}
        name, best = max(peers.items(), key=lambda item: item[1])
        figures.add(f"{product}_{width}x{hidden}_{experts}_experts_{rows}_rows", ours, "GFLOP/s", peer=best, ratio=ours / best,
                    peer_name=name, rounds=len(rates["kernels"]),
                    quartiles=rounded([quantile(rates["kernels"], 0.25), quantile(rates["kernels"], 0.75)], 1),
                    peers={name: round(rate, 1) for name, rate in peers.items()},
                    missing=None if rates["grouped"] else "at::_grouped_mm wants rows of a multiple of 16 bytes")


def spill_figures(name, runs):
    """What the set moved in a step and waited, and what formula (6) says of the step's streams."""
    steps = sum(len(out["step_seconds"]) for out in runs)
    each = {key: sum(out[key] for out in runs) / steps for key in
            ("bytes_read", "bytes_written", "exposed_seconds", "read_seconds", "write_seconds", "misses")}
    more = {"mib_read": round(each["bytes_read"] / 2**20, 1), "mib_written": round(each["bytes_written"] / 2**20, 1),
            "exposed_ms": round(each["exposed_seconds"] * 1e3, 2), "read_ms": round(each["read_seconds"] * 1e3, 2),
            "write_ms": round(each["write_seconds"] * 1e3, 2), "misses": round(each["misses"], 1)}
    if PLACES[name][1]:
        read, write = (max(out[key] for out in runs) for key in ("disk_read", "disk_write"))
        # Of a parameter that is away: states 12 B each way, weights read forward and backward and written after the update.
        # Gradients, 4 B each way, are not in the formula; the streams that the set really moved are. Where states alone are
        # away, the set keeps the weights of all.
        away = runs[0]["expert_parameters"] * (1 - min(1, runs[0]["budget_bytes"] / runs[0]["expert_bytes"]))
        more.update(disk_read_gb=round(read / 1e9, 2), disk_write_gb=round(write / 1e9, 2),
                    formula_ms=round(max(16 * away / read, 14 * away / write) * 1e3, 2),
                    formula_ms_of_moved=round(max(each["bytes_read"] / read, each["bytes_written"] / write) * 1e3, 2))
    return more


def measure_steps(figures, experts, turns, tokens, spill):
    runs = {name: [] for name in PLACES}
    for _ in range(turns):
        for name, (percent, spilled) in PLACES.items():
            runs[name].append(run([os.path.join(BIN, "bench_offload_step"), "tiny-moe", str(experts), str(tokens), "4", "bf16",
                                   str(percent), "1", "apart", *([spill] if spilled else [])]))
    losses = {tuple(out["losses"]) for outs in runs.values() for out in outs}
    if len(losses) != 1:
        raise SystemExit(f"the losses of places differ: {losses}")
    model = "tiny-moe" + (f"_{experts}_experts" if experts else "")
    seconds = {name: [s for out in outs for s in out["step_seconds"]] for name, outs in runs.items()}
    updates = {name: [s for out in outs for s in out["update_seconds"]] for name, outs in runs.items()}
    parameters = runs["resident"][0]["parameters"]
    base, base_update = median(seconds["resident"]), median(updates["resident"])
    for name, outs in runs.items():
        peer = None if name == "resident" else tokens / base
        budget, whole = outs[0]["budget_bytes"], outs[0]["expert_bytes"]
        more = {} if name == "resident" else spill_figures(name, outs)
        figures.add(f"{model}_{name}", tokens / median(seconds[name]), "tokens/s", peer=peer,
                    ratio=peer and base / median(seconds[name]), peer_name=peer and "our resident", tokens=tokens,
                    runs=rounded([tokens / s for s in seconds[name]], 0), expert_parameters=outs[0]["expert_parameters"],
                    budget_share=round(budget / whole, 3) if budget else None, **more)
        figures.add(f"{model}_{name}_update", median(updates[name]) / parameters * 1e9, "ns/parameter",
                    peer=peer and base_update / parameters * 1e9, ratio=peer and base_update / median(updates[name]),
                    peer_name=peer and "our resident", parameters=parameters,
                    runs=rounded([s / parameters * 1e9 for s in updates[name]], 2))


def measure_visits(figures, experts, turns, tokens, spill):
    """Four micro-batches that read a spilled expert one after the other, and all in one visit."""
    runs = {way: [] for way in ("apart", "together")}
    for _ in range(turns):
        for way, outs in runs.items():
            outs.append(run([os.path.join(BIN, "bench_offload_step"), "tiny-moe", str(experts), str(tokens), "4", "bf16",
                             "10", "4", way, spill]))
    losses = {tuple(out["losses"]) for outs in runs.values() for out in outs}
    if len(losses) != 1:
        raise SystemExit(f"the losses of the ways differ: {losses}")
    rates = {way: tokens / median([s for out in outs for s in out["step_seconds"]]) for way, outs in runs.items()}
    moved = {way: spill_figures("spill_10", outs) for way, outs in runs.items()}
    figures.add(f"tiny-moe_{experts}_experts_spill_10_four_micro_batches", rates["together"], "tokens/s", peer=rates["apart"],
                ratio=rates["together"] / rates["apart"], peer_name="a visit for each micro-batch", tokens=tokens,
                moved=moved["together"], peer_moved=moved["apart"])


def main():
    figures = Figures("experts")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        for width, hidden in SHAPES:
            for experts in (8,) if QUICK or hidden < 512 else (8, 32):
                for rows in ROWS:
                    measure_products(figures, width, hidden, experts, rows)
        with tempfile.TemporaryDirectory(dir=option("--spill", None)) as spill:
            for experts in (0, 16):  # of a layer; 0: as the preset has them
                turns = int(option("--turns", "1" if QUICK else "2"))
                measure_steps(figures, experts, turns, int(option("--tokens", "1024")), spill)
            measure_visits(figures, 16, turns, int(option("--tokens", "1024")), spill)
    finally:
        figures.write()


if __name__ == "__main__":
    main()
