#!/usr/bin/env python3
"""How near `heddle plan` comes: its seconds against those of a step of the same run, same threads.

Dense presets: forward and backward. `tiny-moe`: whole steps, its experts in memory and spilled, measured as `experts.py` does.
In turns, each with figures of the host measured right before: on a machine that does other work both sides meet it.
usage: plan.py [--quick] [--presets tiny-dense,...] [--lengths 512,2048] [--precisions bf16,fp32] [--spill DIR]
"""

import json
import os
import subprocess
import sys
import tempfile

from figures import BIN, Figures, median, rounded, run_json

QUICK = "--quick" in sys.argv
CORES = len(os.sched_getaffinity(0))
MOE_TOKENS = 1024
# Percent of the experts' bytes in memory, the rest spilled; 0: not offloaded.
MOE_PLACES = {"resident": 0, "spill_50": 50, "spill_10": 10}


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def words_of(name, default):
    return [word for word in option(name, default).split(",") if word]


def measure_host(home):
    host = [os.path.join(BIN, "heddle-model"), "bench-host", "--dir", home, "--out", os.path.join(home, "host_bench.json")]
    subprocess.run(host, check=True, stdout=subprocess.DEVNULL)


def planned(home, preset, length, precision, *settings):
    """What `heddle plan` says of time: one micro-batch of one document a step."""
    config = os.path.join(home, "run.yaml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"defaults: [model: {preset}]\ndata: {{path: none}}\n")
    words = [config, f"training.max_seq_len={length}", "training.micro_batch_size=1", f"training.precision={precision}",
             f"parallel.cpus_per_rank={CORES}", *settings, "-o", "json"]
    done = subprocess.run([os.path.join(BIN, "heddle"), "plan", *words], check=True, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL, env={**os.environ, "HEDDLE_HOME": home})
    return json.loads(done.stdout)["throughput"]


def run(command):
    out, why = run_json(command)
    if out is None:
        raise SystemExit(f"{' '.join(command)}: {why}")
    return out


def dense_pair(home, preset, length, precision):
    said = planned(home, preset, length, precision)["compute_seconds"]
    out = run([os.path.join(BIN, "bench_model_step"), preset, str(length), "3" if QUICK else "7", precision])
    return said, out["seconds"], {}


def moe_pair(home, place, precision):
    percent = MOE_PLACES[place]
    spilled = [home] if percent else []
    out = run(["env", "GOMP_SPINCOUNT=1000", os.path.join(BIN, "bench_offload_step"), "tiny-moe", "0", str(MOE_TOKENS),
               "2" if QUICK else "6", precision, str(percent), "1", "apart", *spilled])
    settings, more = [], {}
    if percent:
        settings = ["memory.expert_offloading.enabled=true", f"memory.expert_offloading.spill_dir={home}",
                    f"memory.expert_offloading.resident_mb={-(-out['budget_bytes'] // 2**20)}"]
        more = {"budget_share": round(out["budget_bytes"] / out["expert_bytes"], 3)}
    said = planned(home, "tiny-moe", MOE_TOKENS, precision, *settings)["step_seconds"]
    return said, median(out["step_seconds"]), more


def compare(figures, cases):
    """`cases`: by figure's name, what gives (predicted, measured, more of the line)."""
    runs = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(dir=option("--spill", None)) as home:
        for _ in range(1 if QUICK else 3):
            for name, pair in cases.items():
                measure_host(home)
                runs[name].append(pair(home))
    for name, pairs in runs.items():
        figures.add(f"{name}_predicted_to_measured", median([said / took for said, took, _ in pairs]), "of 1",
                    target="0.75 to 1.25", predicted_seconds=rounded([said for said, _, _ in pairs], 4),
                    measured_seconds=rounded([took for _, took, _ in pairs], 4), **pairs[0][2])


def main():
    figures = Figures("plan")
    precisions = words_of("--precisions", "bf16,fp32")
    cases = {}
    for preset in words_of("--presets", "tiny-dense,small-dense,tiny-moe"):
        for precision in precisions:
            if preset == "tiny-moe":
                for place in MOE_PLACES:
                    cases[f"{preset}_{place}_{precision}"] = lambda home, a=(place, precision): moe_pair(home, *a)
                continue
            for length in words_of("--lengths", "512,2048"):
                case = (preset, int(length), precision)
                cases[f"{preset}_{length}_{precision}"] = lambda home, a=case: dense_pair(home, *a)
    compare(figures, cases)
    figures.write()


if __name__ == "__main__":
    main()
