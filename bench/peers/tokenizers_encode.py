#!/usr/bin/env python3
"""The peer of heddle's tokenizer: PyPI `tokenizers` on one thread, called per document as a packer would.

  tokenizers_encode.py encode TOKENIZER INPUT...     tokenizers_encode.py train SIZE INPUT...

Reads the same documents as bench_tokenizer (UTF-8 files of the trees, in order of names). Prints one JSON line.
"""
import json
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402


def documents(inputs):
    for root in inputs:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                with open(os.path.join(folder, name), "rb") as file:
                    raw = file.read()
                if b"\0" in raw[:8192] or not raw or name.startswith("."):
                    continue
                try:
                    yield raw.decode()
                except UnicodeDecodeError:
                    pass


def main():
    verb, subject, *inputs = sys.argv[1:]
    texts = list(documents(inputs))
    size = sum(len(text.encode()) for text in texts)
    if verb == "encode":
        tokenizer = Tokenizer.from_file(subject)
        start = time.perf_counter()
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=int(subject), min_frequency=2, special_tokens=["<|endoftext|>"],
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        start = time.perf_counter()
        tokenizer.train_from_iterator(texts, trainer)
        tokens = 0
    seconds = time.perf_counter() - start
    print(json.dumps({"bytes": size, "tokens": tokens, "seconds": seconds, "mb_per_second": size / 1e6 / seconds}))


if __name__ == "__main__":
    main()
