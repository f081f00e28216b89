#!/usr/bin/env python3
"""Checkpoints of 1 GiB of state: what the step loop waits for, and how long the write takes, beside what the parts cost.

In every round, in turns that start one place later each time: a copy in memory, the bytes written raw with O_DIRECT and fsync,
our save (the trainer's Checkpointer), and the peers (`peers/torch_checkpoint.py`): torch.distributed.checkpoint (DCP) with its
defaults, which sync its files, with 4 threads, without syncing, and asynchronous; torch.save and safetensors with and without an
fsync after them. Our own syncs files and folders always. Everything is on one disk, whose caches are written out before each.
The figures are medians over the rounds, ratios medians of each round's own.
usage: checkpoint.py [--quick] [--mib 1024] [--rounds 9] [--dir FOLDER]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile

from figures import BIN, HERE, Figures, median, peer_python, quantile, rounded

QUICK = "--quick" in sys.argv
PEER = os.path.join(HERE, "peers", "torch_checkpoint.py")
OURS = ("copy", "raw", "save")
PEERS = ("dcp", "dcp_4_threads", "dcp_unsynced", "dcp_async", "torch_save", "safetensors")


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else str(default)


class Talk:
    """A program that answers a word with one JSON line."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"no answer to '{word}': exit status {self.process.wait()}")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def measure(folder, python):
    """A list of rounds: {word: answer}."""
    ours = Talk([os.path.join(BIN, "bench_checkpoint"), folder, option("--mib", 512 if QUICK else 1024)])
    tensors = ours.ask("tensors")
    peer = Talk([python, PEER, folder]) if python else None
    about = {"bytes": tensors["bytes"], "peer": peer.ask(json.dumps(tensors)) if peer else None}
    words = OURS + (PEERS if peer else ())
    rounds = []
    try:
        for number in range(-1, int(option("--rounds", 2 if QUICK else 9))):
            answers = {}
            for place in range(len(words)):
                word = words[(number + place) % len(words)]
                os.sync()
                answers[word] = (ours if word in OURS else peer).ask(word)
            if number >= 0:  # the first one makes buffers: see first_stall
                rounds.append(answers)
            else:
                about["first"] = answers
    finally:
        ours.end()
        if peer:
            peer.end()
    return about, rounds


def of_rounds(rounds, value):
    return [value(one) for one in rounds]


def add(figures, name, rounds, value, unit, **more):
    values = of_rounds(rounds, value)
    figures.add(name, median(values), unit, rounds=rounded(values, 4),
                quartiles=rounded([quantile(values, 0.25), quantile(values, 0.75)], 4), **more)


def best_raw(answers):
    return min(answers["raw"]["raw"], answers["raw"]["raw_4_in_flight"])


def add_ours(figures, about, rounds):
    size = {"bytes": about["bytes"]}
    add(figures, "host_copy", rounds, lambda r: 1000 * r["copy"]["copy"], "ms", threads=1, **size)
    add(figures, "stall_of_a_save", rounds, lambda r: 1000 * r["save"]["stall"], "ms", **size,
        first_ms=round(1000 * about["first"]["save"]["stall"], 1))
    add(figures, "stall_beyond_the_copy", rounds, lambda r: 1000 * (r["save"]["stall"] - r["copy"]["copy"]), "ms", target="<= 10",
        **size)
    add(figures, "raw_direct_write", rounds, lambda r: about["bytes"] / best_raw(r) / 1e9, "GB/s", **size,
        one_in_flight=median(of_rounds(rounds, lambda r: r["raw"]["raw"])),
        four_in_flight=median(of_rounds(rounds, lambda r: r["raw"]["raw_4_in_flight"])))
    add(figures, "background_write", rounds, lambda r: about["bytes"] / r["save"]["write"] / 1e9, "GB/s", **size,
        seconds=median(of_rounds(rounds, lambda r: r["save"]["write"])), synced="files and folders",
        cpu_seconds_with_the_copy=median(of_rounds(rounds, lambda r: r["save"]["cpu"])))
    add(figures, "background_write_share_of_raw", rounds, lambda r: best_raw(r) / r["save"]["write"], "of 1", target=">= 0.6", **size)
    add(figures, "stage_to_sealed", rounds, lambda r: r["save"]["sealed"], "s", **size)


def add_peer(figures, about, rounds, word, key="seconds", synced=True, target=None, against=False):
    failed = [r[word]["error"] for r in rounds if "error" in r[word]]
    name = word + ("_with_fsync" if key == "synced" else "_stall" if key == "stall" else "")
    if failed:
        figures.add(name, None, "s", why=failed[0])
        return
    ours = {"stall": "stall"}.get(key, "sealed")  # from the call on, as the peer's is
    values = of_rounds(rounds, lambda r: r[word][key])
    writes = of_rounds(rounds, lambda r: r[word][key] / r["save"]["write"])
    ratios = of_rounds(rounds, lambda r: r[word][key] / r["save"][ours])
    figures.add(name, median(values), "s", rounds=rounded(values, 4),
                quartiles=rounded([quantile(values, 0.25), quantile(values, 0.75)], 4), peer_name=about["peer"]["torch"],
                synced=synced, ours_is_faster=round(median(ratios), 3), our="stall" if key == "stall" else "stage to sealed")
    if target or against:
        figures.add(f"background_write_against_{word}", median(of_rounds(rounds, lambda r: r["save"]["write"])), "s", target=target,
                    peer=median(values), ratio=median(writes), ratios=rounded(writes), peer_synced=synced,
                    peer_name=f"{word} of torch {about['peer']['torch']}")


def main():
    python, why = peer_python()
    if python is None:
        print(f"no peers: {why}")
    figures = Figures("checkpoint")
    folder = tempfile.mkdtemp(prefix="heddle-bench-", dir=option("--dir", tempfile.gettempdir()))
    try:
        about, rounds = measure(folder, python)
        add_ours(figures, about, rounds)
        if python:
            add_peer(figures, about, rounds, "dcp", target=">= 2x", synced="files")
            add_peer(figures, about, rounds, "dcp_4_threads", against=True, synced="files")
            add_peer(figures, about, rounds, "dcp_unsynced", synced="no")
            add_peer(figures, about, rounds, "dcp_async", key="stall", synced="files")
            add_peer(figures, about, rounds, "dcp_async", synced="files")
            for word in ("torch_save", "safetensors"):
                add_peer(figures, about, rounds, word, synced="no")
                add_peer(figures, about, rounds, word, key="synced", synced="file")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        figures.write()


if __name__ == "__main__":
    main()
