#!/usr/bin/env python3
"""The peers of heddle's checkpoints: torch.distributed.checkpoint (DCP), torch.save and safetensors.

  torch_checkpoint.py DIR < WORDS

The first line of the input is the JSON of `bench_checkpoint`'s word `tensors`: the same tensors are made here, each as a
parameter and two moments in fp32. Every later line is a word, answered with one JSON line, so that programs take turns:
  dcp, dcp_4_threads      dcp.save with FileSystemWriter's defaults: it syncs its files and not their folder
  dcp_unsynced            ... with sync_files=False
  dcp_async               dcp.async_save with its defaults: what the caller waits for, and until the future is done. Buffers are
                          not kept from save to save: that pins them, which wants a GPU
  torch_save, safetensors a plain file; `seconds` without and `synced` with an fsync after it
Every choice that is open is the peer's default or the faster one. One process without a process group.
"""

import json
import os
import shutil
import sys
import time
import warnings

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

FOLDER = os.path.join(sys.argv[1], "peer")
CLASSES = ("", ".exp_avg", ".exp_avg_sq")


def writer(**options):
    return dcp.FileSystemWriter(FOLDER, **options)


def save_with_dcp(state, **options):
    start = time.perf_counter()
    dcp.save(state, storage_writer=writer(**options), no_dist=True)
    return {"seconds": time.perf_counter() - start}


def save_async(state):
    # Without a GPU nothing can be pinned, so the copy is made anew and before the call returns.
    start = time.perf_counter()
    future = dcp.async_save(state, storage_writer=writer(), no_dist=True)
    stall = time.perf_counter() - start
    future.result()
    return {"stall": stall, "seconds": time.perf_counter() - start}


def save_plainly(state, save):
    os.makedirs(FOLDER)
    path = os.path.join(FOLDER, "state")
    start = time.perf_counter()
    save(state, path)
    seconds = time.perf_counter() - start
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return {"seconds": seconds, "synced": time.perf_counter() - start}


WORDS = {
    "dcp": save_with_dcp,
    "dcp_4_threads": lambda state: save_with_dcp(state, thread_count=4),
    "dcp_unsynced": lambda state: save_with_dcp(state, sync_files=False),
    "dcp_async": save_async,
    "torch_save": lambda state: save_plainly(state, torch.save),
    "safetensors": lambda state: save_plainly(state, save_file),
}


def main():
    tensors = json.loads(sys.stdin.readline())["tensors"]
    state = {name + part: torch.rand(elements) for name, elements in tensors for part in CLASSES}
    print(json.dumps({"torch": torch.__version__, "bytes": sum(t.numel() * t.element_size() for t in state.values())}), flush=True)
    for line in sys.stdin:
        try:
            out = WORDS[line.strip()](state)
        except Exception as error:  # pylint: disable=broad-except
            out = {"error": f"{type(error).__name__}: {error}"}
        shutil.rmtree(FOLDER, ignore_errors=True)
        print(json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
