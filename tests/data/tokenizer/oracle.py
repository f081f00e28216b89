#!/usr/bin/env python3
"""The reference for tokenizer tests: PyPI `tokenizers`.

  oracle.py golden OUT_DIR              writes tests/golden/tokenizer anew
  oracle.py cases TOKENIZER SEED COUNT  random texts with the reference's ids, as JSON lines
  oracle.py train CORPUS SIZE           trains a byte-level BPE and prints its tokenizer.json

Exit status 77: the package is not installed.
"""
import json
import random
import sys
from pathlib import Path

try:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
except ImportError:
    print("PyPI package `tokenizers` is not installed")
    sys.exit(77)

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

SPACES = [" ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2003", "\u3000", "\u180e", "\u200b", "\u0085",
          "\u2028", "\x0b", "\x0c", "\x1f", " " * 7, " " * 40]
WORDS = ["hello", "World", "don't", "I'LL", "we've", "it'S", "'\u017f", "x", "return", "self.", "==", "!=", "_private",
         "1", "12", "123", "1234567", "3.14", "\u0661\u0662", "\u2460", "na\u00efve", "na\u0069\u0308ve", "Stra\u00dfe",
         "\u0440\u0443\u0441\u0441\u043a\u0438\u0439", "\u65e5\u672c\u8a9e", "\ud55c\uad6d\uc5b4", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u05e2\u05d1\u05e8\u05d9\u05ea", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
         "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "\u0000", "\ufeff", "\ufffd",
         "a" * 60, "ab" * 40, "-" * 30, "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|", "[ADDED]",
         "[ADD", "[ADDED]]"]
RANGES = [(0x20, 0x7e), (0x80, 0x24f), (0x300, 0x36f), (0x370, 0x52f), (0x600, 0x6ff), (0x900, 0x97f),
          (0x1680, 0x180f), (0x2000, 0x206f), (0x2100, 0x2bff), (0x3000, 0x30ff), (0x4e00, 0x9fff),
          (0xac00, 0xd7a3), (0xfe00, 0xffff), (0x1f300, 0x1f6ff), (0x10000, 0x10ffff)]


def random_text(rng):
    parts = []
    for _ in range(rng.randint(0, 14)):
        kind = rng.random()
        if kind < 0.35:
            parts.append(rng.choice(SPACES))
        elif kind < 0.75:
            parts.append(rng.choice(WORDS))
        else:
            for _ in range(rng.randint(1, 6)):
                low, high = rng.choice(RANGES)
                code = rng.randint(low, high)
                if not 0xd800 <= code <= 0xdfff:
                    parts.append(chr(code))
    return "".join(parts)


def case(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return {"text": text, "ids": ids, "with_special": tokenizer.encode(text, add_special_tokens=True).ids,
            "decoded": tokenizer.decode(ids, skip_special_tokens=True),
            "decoded_all": tokenizer.decode(ids, skip_special_tokens=False)}


def gpt2_style():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(tokenizer, corpus, size, special):
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([corpus], trainer)
    return tokenizer


def golden(out):
    corpus = (out / "corpus.txt").read_bytes().decode()
    gpt2 = train(gpt2_style(), corpus, 700, ["<|endoftext|>"])
    llama3 = Tokenizer(models.BPE(ignore_merges=True))
    llama3.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    llama3.decoder = decoders.ByteLevel()
    train(llama3, corpus, 600, ["<|begin_of_text|>", "<|end_of_text|>"])
    llama3.add_tokens([AddedToken("[ADDED]", normalized=False), AddedToken("[ADD", normalized=True)])
    bos = llama3.token_to_id("<|begin_of_text|>")
    llama3.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])])
    prefix = train(gpt2_style(), corpus, 500, ["<|endoftext|>"])
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rng = random.Random(20240611)
    with open(out / "cases.jsonl", "w", encoding="utf-8") as file:
        for name, tokenizer in (("gpt2_style", gpt2), ("llama3_style", llama3), ("prefix_space", prefix)):
            tokenizer.save(str(out / f"{name}.json"), pretty=False)
            texts = [""] + SPACES + WORDS + [" ".join(WORDS[i:i + 3]) for i in range(len(WORDS) - 2)]
            texts += [random_text(rng) for _ in range(120)]
            for text in texts:
                file.write(json.dumps({"tokenizer": name} | case(tokenizer, text)) + "\n")


def main():
    verb = sys.argv[1]
    if verb == "golden":
        golden(Path(sys.argv[2]))
    elif verb == "cases":
        tokenizer = Tokenizer.from_file(sys.argv[2])
        rng = random.Random(int(sys.argv[3]))
        for _ in range(int(sys.argv[4])):
            print(json.dumps(case(tokenizer, random_text(rng))))
    elif verb == "train":
        corpus = Path(sys.argv[2]).read_bytes().decode()
        print(train(gpt2_style(), corpus, int(sys.argv[3]), ["<|endoftext|>"]).to_str())
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
