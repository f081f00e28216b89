#!/usr/bin/env python3
"""Collectives between processes of one host by back end and size, beside LibTorch's own Gloo group as DDP and FSDP2 use it.

Milliseconds of an all-reduce, a reduce-scatter (fp32 and bf16 on the wire), an all-gather and an all-to-all, ours as one of
uneven slices; a size is the number of fp32 elements of the whole tensor. Back ends take turns, round by round of processes.
usage: collectives.py [--ranks 2,3,4] [--sizes 16384,1048576,16777216] [--rounds 5] [--turns 3] [--quick]
"""

import os
import sys

from figures import BIN, Figures, median, rounded, run_json

QUICK = "--quick" in sys.argv
BACKENDS = ("gloo", "shared", "mpi", "c10d")
OPERATIONS = ("all_reduce", "reduce_scatter", "reduce_scatter_bf16", "all_gather", "all_to_all")


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def measure(ranks, sizes, rounds, turns):
    """(backend, operation, size) -> seconds of every round of every turn."""
    seconds = {}
    os.environ["OMP_NUM_THREADS"] = "1"
    for _ in range(turns):
        for backend in BACKENDS:
            out, why = run_json([os.path.join(BIN, "bench_collectives"), backend, str(ranks), rounds, *sizes])
            if out is None:
                raise SystemExit(f"bench_collectives {backend}: {why}")
            for key, values in out.items():
                operation, size = key.rsplit("_", 1)
                seconds.setdefault((backend, operation, size), []).extend(values)
    return seconds


def main():
    sizes = option("--sizes", "1048576" if QUICK else "16384,1048576,16777216").split(",")
    figures = Figures("collectives")
    for ranks in map(int, option("--ranks", "2" if QUICK else "2,4").split(",")):
        seconds = measure(ranks, sizes, option("--rounds", "5"), int(option("--turns", "1" if QUICK else "3")))
        for size in sizes:
            for operation in OPERATIONS:
                # LibTorch has no bf16 wire with sums in fp32: its fp32 operation is the peer.
                peer = seconds[("c10d", operation.replace("_bf16", ""), size)]
                for backend in BACKENDS[:-1]:
                    ours = seconds[(backend, operation, size)]
                    figures.add(f"{operation}_{backend}_{ranks}_ranks_{size}", median(ours) * 1e3, "ms",
                                peer=median(peer) * 1e3, ratio=median(peer) / median(ours), peer_name="c10d ProcessGroupGloo",
                                runs=rounded([s * 1e3 for s in ours], 3), ranks=ranks, elements=int(size), backend=backend)
    figures.write()


main()
