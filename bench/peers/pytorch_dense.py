#!/usr/bin/env python3
"""The peer of heddle's trainer: the same dense language model in PyTorch eager, trained the same way.

  pytorch_dense.py --config FILE --data DIR --steps N --warmup N --threads N [--compile]
                   [--ranks N --parallel ddp|fsdp2]

FILE is the resolved run configuration as `heddle config show CONFIG -o json` prints it; DIR a packed set. Prints one JSON
line: tokens/s of each step behind the warm-up, over all ranks, first and last loss, parameters. Ranks are processes of
this machine over Gloo, each with N threads; FSDP2 shards every block and the rest, with bf16 parameters and fp32 sums.

RMSNorm, rotary positions (half layout), grouped-query attention, SwiGLU, tied head, AdamW with fp32 weights, autocast to
bf16 where the configuration says so. What is kind to the peer is chosen where there is a choice: fused AdamW, SDPA with
`is_causal` over whole sequences instead of a document mask (which would force the slow path), batches of full sequences,
tokens held in memory, no data loader, no checkpoint, no metric but the loss.
"""
import argparse
import json
import os
import socket
import struct
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotate(x, cos, sin):
    """x [B, H, T, D], cos and sin [T, D/2]; half layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.heads, self.kv_heads, self.dim = m["n_heads"], m["n_kv_heads"], m["head_dim"]
        self.q_proj = nn.Linear(m["d_model"], self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(m["d_model"], self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(m["d_model"], self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, m["d_model"], bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.input_layernorm = RMSNorm(m["d_model"], m["norm_eps"])
        self.self_attn = Attention(m)
        self.post_attention_layernorm = RMSNorm(m["d_model"], m["norm_eps"])
        self.gate_proj = nn.Linear(m["d_model"], m["d_ffn"], bias=False)
        self.up_proj = nn.Linear(m["d_model"], m["d_ffn"], bias=False)
        self.down_proj = nn.Linear(m["d_ffn"], m["d_model"], bias=False)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class LanguageModel(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.embed = nn.Embedding(m["vocab_size"], m["d_model"])
        self.layers = nn.ModuleList(Block(m) for _ in range(m["n_layers"]))
        self.norm = RMSNorm(m["d_model"], m["norm_eps"])
        self.head = self.embed.weight if m["tie_embeddings"] else nn.Parameter(torch.empty_like(self.embed.weight))
        self.theta, self.dim = m["rope_theta"], m["head_dim"]
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, labels, dtype):
        t = tokens.shape[1]
        frequency = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        angle = torch.outer(torch.arange(t, dtype=torch.float32), frequency)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        x = self.embed(tokens).to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.head)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def read_tokens(folder):
    """All tokens of a packed set (formats.md F25)."""
    tokens = []
    for shard in json.loads((folder / "dataset.json").read_text())["shards"]:
        raw = (folder / shard["file"]).read_bytes()
        width, count = struct.unpack_from("<I", raw, 12)[0], struct.unpack_from("<Q", raw, 32)[0]
        kind = torch.int16 if width == 2 else torch.int32
        part = torch.frombuffer(bytearray(raw[4096:4096 + width * count]), dtype=kind).long()
        tokens.append(part & 0xFFFF if width == 2 else part)
    return torch.cat(tokens)


def model_group(config):
    model = {"norm_eps": 1e-6, "tie_embeddings": True, **config["model"]}
    model["rope_theta"] = model.get("rope", {}).get("theta", 10000.0)
    return model


def shard(model, kind, bf16):
    """The model as its ranks see it."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def rank_main(rank, args, port):
    """One of several ranks; the first prints."""
    if args.ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=args.ranks)
    result = train(args, rank)
    if rank == 0:
        print(json.dumps(result))
    if args.ranks > 1:
        torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    for name, kind in (("--config", Path), ("--data", Path), ("--steps", int), ("--warmup", int), ("--threads", int)):
        parser.add_argument(name, type=kind, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    args = parser.parse_args()
    if args.ranks == 1:
        rank_main(0, args, 0)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, args=(args, port), nprocs=args.ranks)


def train(args, rank):
    torch.set_num_threads(args.threads)
    if args.ranks > 1:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]} if args.threads == 1 else os.sched_getaffinity(0))
    torch.manual_seed(0)
    config = json.loads(args.config.read_text())
    training = config["training"]
    length, micro = training["max_seq_len"], training["micro_batch_size"]
    accumulation = training.get("gradient_accumulation_steps", 1)
    bf16 = training["precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = LanguageModel(model_group(config))
    if args.ranks > 1:
        model = shard(model, args.parallel, bf16)
    loss_of = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=training["learning_rate"], fused=True,
                                  betas=(training.get("beta1", 0.9), training.get("beta2", 0.95)),
                                  weight_decay=training.get("weight_decay", 0.1))
    data = read_tokens(args.data)
    windows = (len(data) - 1) // length
    order = torch.randperm(windows)
    at = rank * windows // args.ranks
    rates, losses = [], []
    for step in range(args.warmup + args.steps):
        start = time.perf_counter()
        total = 0.0
        for _ in range(accumulation):
            picked = [order[(at + i) % windows] * length for i in range(micro)]
            at += micro
            tokens = torch.stack([data[p:p + length] for p in picked])
            labels = torch.stack([data[p + 1:p + length + 1] for p in picked])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = loss_of(tokens, labels, dtype)
            (loss / accumulation).backward()
            total += loss.item() / accumulation
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.get("grad_clip", 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        losses.append(total)
        if step >= args.warmup:
            rates.append(args.ranks * micro * accumulation * length / seconds)
    return {"tokens_per_second": rates, "first_loss": losses[0], "last_loss": losses[-1],
            "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
            "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
