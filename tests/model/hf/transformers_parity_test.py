#!/usr/bin/env python3
"""Logits of heddle-model against Transformers, both directions (formats.md I2, I3).

Tiny random models are saved by Transformers, run by `heddle-model logits`, imported by
`heddle-model import` and loaded back by Transformers. Largest difference 1e-4 in fp32.

Needs the PyPI packages torch, transformers and safetensors: `./dev test --interop` installs them
into a virtual environment and names its interpreter in HEDDLE_INTEROP_PYTHON. Skips loudly (exit
status 77) without.
"""
import os
import subprocess
import sys
import tempfile

INTERPRETER = os.environ.get("HEDDLE_INTEROP_PYTHON", "")
if INTERPRETER and os.path.realpath(sys.prefix) != os.path.realpath(
        os.path.join(os.path.dirname(INTERPRETER), "..")):
    os.execv(INTERPRETER, [INTERPRETER, os.path.abspath(__file__), *sys.argv[1:]])

try:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MistralConfig,
                              MixtralConfig, Qwen2Config)
    from transformers import DeepseekV32Config
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

DEEPSEEK = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8,
                v_head_dim=10, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=3,
                n_shared_experts=1, moe_intermediate_size=24, n_group=4, topk_group=2,
                first_k_dense_replace=1, routed_scaling_factor=2.5)
DEEP_YARN = dict(YARN, mscale=0.8, mscale_all_dim=0.8)
# Enough heads that a row of scores has no exact zeros: torch.topk orders ties as it likes.
INDEX = dict(index_n_heads=16, index_head_dim=16)

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
    "llama yarn factor": (LlamaConfig, dict(rope_parameters=dict(YARN, attention_factor=1.5))),
    "llama yarn, short": (LlamaConfig, dict(max_position_embeddings=64, rope_parameters=YARN)),
    "qwen2": (Qwen2Config, dict()),
    "qwen2 tied": (Qwen2Config, dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "qwen2 windows": (Qwen2Config, dict(use_sliding_window=True, sliding_window=16,
                                        max_window_layers=1)),
    "mixtral": (MixtralConfig, dict(num_local_experts=5, num_experts_per_tok=2)),
    "mixtral window, top 1": (MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=1,
                                                  sliding_window=16)),
    "deepseek_v3": (DeepseekV3Config, DEEPSEEK),
    "deepseek_v3 no q lora": (DeepseekV3Config, dict(DEEPSEEK, q_lora_rank=None, n_group=1,
                                                     topk_group=1)),
    "deepseek_v3 yarn": (DeepseekV3Config, dict(DEEPSEEK, rope_parameters=DEEP_YARN)),
    "deepseek_v3 half, tied": (DeepseekV3Config, dict(DEEPSEEK, rope_interleave=False,
                                                      tie_word_embeddings=True)),
    "deepseek_v32": (DeepseekV32Config, dict(DEEPSEEK, **INDEX, index_topk=16)),
    "deepseek_v32, all keys": (DeepseekV32Config, dict(DEEPSEEK, **INDEX, index_topk=200)),
}
# Read, but written under our own type, which Transformers does not know.
READ_ONLY = {"deepseek_v32", "deepseek_v32, all keys"}


def run(*words):
    subprocess.run([PROGRAM, *words], check=True, stdout=subprocess.DEVNULL)


def heddle_logits(folder, ids, scratch):
    source, target = os.path.join(scratch, "in"), os.path.join(scratch, "out")
    save_file({"input_ids": ids}, source)
    run("logits", folder, "--input", source, "--out", target)
    return load_file(target)["logits"]


def randomize(model):
    """Values that a fresh model has at 0 or 1, so that a lost one shows: biases, gains, and the
    selection bias of routers."""
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                values.copy_(torch.randn_like(values) * 0.1)
            elif name.endswith(".bias"):
                values.copy_(torch.randn_like(values) * 0.3)
            elif "norm" in name:
                values.mul_(1 + 0.2 * torch.randn_like(values))


def returned_difference(theirs, ids, expected, scratch):
    """Our import of their folder, loaded by them again."""
    ours = os.path.join(scratch, "ours")
    run("import", theirs, "--out", ours)
    back, info = AutoModelForCausalLM.from_pretrained(
        ours, output_loading_info=True, dtype=torch.float32, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        return (back.eval()(ids).logits - expected).abs().max().item()


def check(name, kind, options):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(kind(**{**BASE, **options}),
                                             attn_implementation="eager").float().eval()
    randomize(model)
    ids = torch.randint(0, 101, (2, 100))
    with torch.no_grad():
        expected = model(ids).logits
    with tempfile.TemporaryDirectory() as scratch:
        theirs = os.path.join(scratch, "theirs")
        model.save_pretrained(theirs)
        returned = 0.0
        if name not in READ_ONLY:
            returned = returned_difference(theirs, ids, expected, scratch)
        difference = (heddle_logits(theirs, ids, scratch) - expected).abs().max().item()
    spread = expected.std().item()
    written = "not written    " if name in READ_ONLY else f"written {returned:.1e}"
    print(f"{name:24} read {difference:.1e}  {written}  (logits' deviation {spread:.2f})")
    assert spread > 0.1, "logits too small to compare"
    assert difference <= TOLERANCE, name
    assert returned <= TOLERANCE, name


# Arguments: only the cases whose name has one of them.
WANTED = [case for case in CASES
          if len(sys.argv) == 1 or any(word in case for word in sys.argv[1:])]
assert WANTED, sys.argv
for case in WANTED:
    check(case, *CASES[case])
print(f"{len(WANTED)} models agree")
