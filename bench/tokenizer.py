#!/usr/bin/env python3
"""Tokenizer speed of one core against PyPI `tokenizers`, in turns, on the Python standard library's sources."""

import os
import subprocess
import sysconfig
import tempfile

from figures import BIN, HERE, Figures, median, peer_python, rounded, run_json

ROUNDS = 5
SIZE = "8192"
PEER = os.path.join(HERE, "peers", "tokenizers_encode.py")


def copy_corpus(folder):
    """The standard library's .py files, so that both sides read the same tree without caches and site-packages."""
    lib = sysconfig.get_paths()["stdlib"]
    for root, folders, names in os.walk(lib):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__")]
        for name in names:
            if name.endswith(".py"):
                target = os.path.join(folder, os.path.relpath(root, lib))
                os.makedirs(target, exist_ok=True)
                with open(os.path.join(root, name), "rb") as source, open(os.path.join(target, name), "wb") as out:
                    out.write(source.read())


def compare(figures, figure, unit, ours, peers, why, higher_is_better, target):
    pairs = [(a / b if higher_is_better else b / a) for a, b in zip(ours, peers)]
    figures.add(figure, median(ours), unit, target=target, peer=median(peers), ratio=median(pairs), runs=rounded(ours),
                peer_runs=rounded(peers), peer_name="PyPI tokenizers 0.23.3", peer_missing=why or None)


def main():
    figures = Figures("tokenizer")
    bench = os.path.join(BIN, "bench_tokenizer")
    python, why = peer_python()
    with tempfile.TemporaryDirectory(prefix="heddle-bench-") as folder:
        corpus, tokenizer = os.path.join(folder, "corpus"), os.path.join(folder, "tokenizer.json")
        copy_corpus(corpus)
        subprocess.run([bench, "train", SIZE, tokenizer, corpus], check=True, stdout=subprocess.DEVNULL)
        rates, peer_rates, seconds, peer_seconds, tokens = [], [], [], [], set()
        for _ in range(ROUNDS):
            ours, error = run_json([bench, "encode", tokenizer, corpus])
            if ours is None:
                raise SystemExit(f"bench_tokenizer: {error}")
            rates.append(ours["mb_per_second"])
            tokens.add(ours["tokens"])
            seconds.append(run_json([bench, "train", SIZE, os.path.join(folder, "again.json"), corpus])[0]["seconds"])
            if python is None:
                continue
            peer, why = run_json([python, PEER, "encode", tokenizer, corpus])
            if peer is not None:
                peer_rates.append(peer["mb_per_second"])
                tokens.add(peer["tokens"])
                peer_seconds.append(run_json([python, PEER, "train", SIZE, corpus])[0]["seconds"])
        compare(figures, "tokenizer_encode_one_core", "MB/s", rates, peer_rates, why, True, ">= 15")
        compare(figures, f"tokenizer_train_{SIZE}", "s", seconds, peer_seconds, why, False, "<= 60")
        figures.add("tokenizer_token_counts_equal", float(len(tokens) == 1), "1 = yes", target="1")
    figures.write()


if __name__ == "__main__":
    main()
