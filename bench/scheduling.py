#!/usr/bin/env python3
"""The scheduler on a large cluster: 10,000 nodes of four kinds, 100,000 queued gangs of 200 shapes.

A pass: milliseconds of its snapshot, which the state thread waits for, and of the pass itself, over passes that fill an idle
cluster and over such between which gangs end, nodes are cordoned, lost and return, and gangs are submitted. End to end: gangs
assigned a second by a whole coordinator with its journal on this disk, from a queue of all gangs on; its workers are messages,
which register, beat, and report every state of their tasks (`bench_scheduling`). gRPC is left out.
usage: scheduling.py [--quick] [--nodes 10000] [--gangs 100000] [--shapes 200] [--passes 300] [--seconds 15] [--rounds 3]
"""

import os
import shutil
import sys
import tempfile

from figures import BIN, Figures, median, quantile, rounded, run_json

QUICK = "--quick" in sys.argv
PROGRAM = os.path.join(BIN, "bench_scheduling")
# Published figures for jobs admitted a second, not measured here: their clusters are not this machine.
PUBLISHED = {"Kueue": 43, "Flux": 242}


def option(name, default, quick=None):
    default = quick if QUICK and quick is not None else default
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else str(default)


def run(*arguments):
    out, why = run_json([PROGRAM, *arguments])
    if out is None:
        raise SystemExit(f"bench_scheduling: {why}")
    return out


def passes(figures, nodes, gangs, shapes):
    out = run("pass", nodes, gangs, shapes, option("--passes", 300, 20))
    size = {"nodes": int(nodes), "gangs": int(gangs), "shapes": int(shapes)}
    for name, filling in (("steady", False), ("filling", True)):
        of_kind = [one for one in out["passes"] if one["filling"] == filling]
        both = [one["snapshot_ms"] + one["pass_ms"] for one in of_kind]
        figures.add(f"{name}_pass_p99", quantile(both, 0.99), "ms", target="<= 100", passes=len(both), **size,
                    p50=round(median(both), 2), quartiles=rounded([quantile(both, 0.25), quantile(both, 0.75)]),
                    max_ms=round(max(both), 2), placed=sum(one["placed"] for one in of_kind),
                    tasks=sum(one["tasks"] for one in of_kind), dropped=sum(one["dropped"] for one in of_kind))
        snapshots = [one["snapshot_ms"] for one in of_kind]
        figures.add(f"{name}_snapshot_p99", quantile(snapshots, 0.99), "ms", **size, p50=round(median(snapshots), 2),
                    thread="state")
        applied = [1000 * one["apply_ms"] / one["placed"] for one in of_kind if one["placed"]]
        figures.add(f"{name}_apply_of_a_placement_p50", median(applied), "us", **size, thread="state")


def place(figures, name, life_ms, nodes, gangs, shapes):
    """Placements a second while gangs are assigned: to the last one if the cluster fills, else over the whole time."""
    rates, runs = [], []
    for _ in range(int(option("--rounds", 3, 1))):
        folder = tempfile.mkdtemp(prefix="heddle-bench-")
        try:
            out = run("place", folder, nodes, gangs, shapes, option("--seconds", 15, 5), str(life_ms))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        at = out.pop("assigned_at")
        seconds = out["seconds"] if life_ms else at[-1]
        rates.append((out["assigned"] if life_ms else 100 * len(at)) / seconds)
        runs.append({**out, "first_at": at[0], "last_at": at[-1]})
    rate = median(rates)
    figures.add(name, rate, "1/s", target=">= 1000", runs=rounded(rates, 1), details=runs, life_ms=life_ms,
                quartiles=rounded([quantile(rates, 0.25), quantile(rates, 0.75)], 1), nodes=int(nodes), gangs=int(gangs),
                shapes=int(shapes), published=PUBLISHED,
                peer_name="none run here; published: Kueue 43/s, Flux 242/s")
    figures.add(f"{name}_pass_p99", median([one["pass_p99_ms"] for one in runs]), "ms", target="<= 100",
                runs=[one["pass_p99_ms"] for one in runs], what="the coordinator's own figure, beside all its other work")


def main():
    nodes, gangs = option("--nodes", 10000, 2000), option("--gangs", 100000, 20000)
    shapes = option("--shapes", 200)
    figures = Figures("scheduling")
    try:
        passes(figures, nodes, gangs, shapes)
        place(figures, "placements_that_stay_per_second", 0, nodes, gangs, shapes)
        place(figures, "placements_whose_gangs_end_per_second", 1000, nodes, gangs, shapes)
    finally:
        figures.write()


if __name__ == "__main__":
    main()
