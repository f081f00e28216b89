#!/usr/bin/env python3
"""One step (forward and backward) of every tiny preset on one document of growing length: tokens/s beside tiny-dense's of
the same run, and the peak memory the step needs. With a fixed number of keys a row memory must grow linearly: the record
has the growth from the length before. usage: lengths.py [--lengths 2048,16384] [--presets tiny-dense,tiny-nsa]
"""

import os
import sys

from figures import BIN, Figures, run_json

PRESETS = ["tiny-dense", "tiny-swa", "tiny-nsa", "tiny-dsa", "tiny-gsa", "tiny-mla", "tiny-swa-mla", "tiny-moe"]


def argument(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main():
    lengths = [int(n) for n in argument("--lengths", "2048,4096,8192,16384").split(",")]
    presets = argument("--presets", ",".join(PRESETS)).split(",")
    figures = Figures("lengths")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    before = {}
    for length in lengths:
        dense = None
        for preset in presets:
            step, why = run_json([os.path.join(BIN, "bench_model_step"), preset, str(length), "3"])
            if step is None:
                raise SystemExit(f"bench_model_step {preset} {length}: {why}")
            if preset == "tiny-dense":
                dense = step
            rate, peak = step["tokens_per_second"], step["peak_bytes"]
            figures.add(f"tokens_per_second_{preset}_{length}", rate, "tokens/s",
                        target=">= dense" if dense and preset != "tiny-dense" else None,
                        peer=dense and dense["tokens_per_second"], ratio=dense and rate / dense["tokens_per_second"],
                        seconds=step["seconds"])
            last = before.get(preset)
            figures.add(f"peak_memory_{preset}_{length}", peak / 2**20, "MiB", per_token_bytes=round(peak / length),
                        growth=round(peak / last[1], 2) if last else None, of_length=length / last[0] if last else None)
            before[preset] = (length, peak)
    figures.write()


main()
