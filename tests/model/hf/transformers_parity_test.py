#!/usr/bin/env python3
"""Logits of heddle-model against Transformers, both directions (formats.md I2, I3).

Tiny random models are saved by Transformers, run by `heddle-model logits`, imported by
`heddle-model import` and loaded back by Transformers. Largest difference 1e-4 in fp32.

Needs the PyPI packages torch, transformers and safetensors; skips loudly (exit status 77) without.
"""
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
except ImportError as error:
    print(f"SKIPPED: Transformers parity was NOT checked: {error}", file=sys.stderr)
    sys.exit(77)

PROGRAM = os.path.join(os.environ["HEDDLE_BIN"], "heddle-model")
TOLERANCE = 1e-4
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=5e5)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e4)
BASE = dict(vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            initializer_range=0.2)

CASES = {
    "llama": (LlamaConfig, dict()),
    "llama tied, no groups": (LlamaConfig, dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama head_dim": (LlamaConfig, dict(head_dim=24, rms_norm_eps=1e-5)),
    "llama theta": (LlamaConfig, dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama linear": (LlamaConfig, dict(rope_parameters=dict(rope_type="linear", factor=4.0,
                                                            rope_theta=1e4))),
    "llama llama3": (LlamaConfig, dict(rope_parameters=LLAMA3)),
    "llama yarn": (LlamaConfig, dict(rope_parameters=YARN)),
    "mistral": (MistralConfig, dict(sliding_window=None)),
    "mistral window": (MistralConfig, dict(sliding_window=16)),
}


def run(*words):
    subprocess.run([PROGRAM, *words], check=True, stdout=subprocess.DEVNULL)


def heddle_logits(folder, ids, scratch):
    source, target = os.path.join(scratch, "in"), os.path.join(scratch, "out")
    save_file({"input_ids": ids}, source)
    run("logits", folder, "--input", source, "--out", target)
    return load_file(target)["logits"]


def check(name, kind, options):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(kind(**{**BASE, **options}),
                                             attn_implementation="eager").float().eval()
    ids = torch.randint(0, 101, (2, 100))
    with torch.no_grad():
        expected = model(ids).logits
    with tempfile.TemporaryDirectory() as scratch:
        theirs, ours = os.path.join(scratch, "theirs"), os.path.join(scratch, "ours")
        model.save_pretrained(theirs)
        difference = (heddle_logits(theirs, ids, scratch) - expected).abs().max().item()
        run("import", theirs, "--out", ours)
        back, info = AutoModelForCausalLM.from_pretrained(
            ours, output_loading_info=True, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            returned = (back.eval()(ids).logits - expected).abs().max().item()
    spread = expected.std().item()
    print(f"{name:24} read {difference:.1e}  written {returned:.1e}  (logits' deviation {spread:.2f})")
    assert spread > 0.1, "logits too small to compare"
    assert difference <= TOLERANCE, name
    assert returned <= TOLERANCE, name
    assert not info["missing_keys"] and not info["unexpected_keys"], info


for case, (config_class, config_options) in CASES.items():
    check(case, config_class, config_options)
print(f"{len(CASES)} models agree")
