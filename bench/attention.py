#!/usr/bin/env python3
"""The attention of one layer, forward and backward, bf16, against LibTorch's flash attention over all visible keys.

Shapes of attention-and-moe.md 16.2: head width 128, two key heads; dense, swa (W 256 A 4), gsa and dsa (k 256, four
indexer heads of 64) with 8 query heads, nsa (l 32 r 16 B 64 n 8 W 512) with 32. Selection, compression and the
indexer's loss are included; the loss's share is also given apart. One thread, its processor time, in turns.
usage: attention.py [--quick]
"""

import os
import sys

from figures import BIN, Figures, median, quantile, rounded, run_json

QUICK = "--quick" in sys.argv
LENGTHS = (512, 1024, 2048) if QUICK else (512, 1024, 2048, 4096, 8192, 16384)
# product.md section 6 at 16,384 tokens, and what the floating-point operations allow there (section 12).
TARGETS = {"swa": (15, 31.8), "nsa": (3, 5.15), "gsa": (4, 14.3), "dsa": (4, 14.3)}


def run(kind, length):
    out, why = run_json([os.path.join(BIN, "bench_attention"), kind, str(length), "1", "1" if QUICK else "2"])
    if out is None:
        raise SystemExit(f"bench_attention {kind} {length}: {why}")
    return out


def both(out, who):
    return [forward + backward for forward, backward in zip(out[f"{who}_forward"], out[f"{who}_backward"])]


def measure(figures, kind, length):
    out = run(kind, length)
    ours, peer = both(out, "ours"), both(out, "peer")
    target, ceiling = TARGETS.get(kind, (None, None)) if length == 16384 else (None, None)
    more = {}
    if kind in ("gsa", "dsa") and length <= 4096:
        more["milliseconds_without_indexer_loss"] = round(1e3 * median(both(run(f"{kind}-no-loss", length), "ours")), 3)
    figures.add(f"{kind}_{length}", 1e3 * median(ours), "ms", target=f">= {target or 1.0}x", peer=1e3 * median(peer),
                ratio=median(peer) / median(ours), peer_name="at::_scaled_dot_product_flash_attention_for_cpu",
                rounds=len(ours), quartiles=rounded([1e3 * quantile(sorted(ours), q) for q in (0.25, 0.75)], 3),
                ours_forward=round(1e3 * median(out["ours_forward"]), 3), ceiling_by_operations=ceiling, **more)


def main():
    figures = Figures("attention")
    try:
        for kind in ("dense", "swa", "nsa", "gsa", "dsa"):
            for length in LENGTHS:
                measure(figures, kind, length)
    finally:
        figures.write()


if __name__ == "__main__":
    main()
