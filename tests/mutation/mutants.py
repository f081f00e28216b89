#!/usr/bin/env python3
"""Plants known bugs of public implementations, one at a time, on a copy of the sources; each must make a named test fail.

The list follows attention-and-moe.md section 15: number there, what is wrong, where it is planted, the test that must
catch it. A mutant whose place is gone is an error (the list must follow the code); one that no test notices fails the run.
usage: mutants.py [--only N[,N]] [--keep]        about 8 minutes on two cores, most of it compilation
       mutants.py --check                        only whether every place is still there
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORK = os.path.join(ROOT, "build", "mutants")
SOURCES = os.path.join(WORK, "sources")

# (bug of section 15, what is planted, file, text, replacement, test executable, filter)
MUTANTS = [
    (1, "the best keys are not intersected with the causal mask in a document's first row",
     "kernels/indexer/body_scores.h", "return Max(last - p.first[row] + 1, 0);",
     "return Max(last - p.first[row] + 1, 0) + (p.last == nullptr && row == p.first[row] ? 1 : 0);",
     "model_indexer_test", "Indexer.C7*:Indexer.D2*"),
    (1, "a query sees the key after its own", "model/attention/key_sets.cc",
     "sets.end.push_back(row + 1); });", "sets.end.push_back(std::min(row + 2, static_cast<int32_t>(documents.rows()))); });",
     "model_sparse_test", "SparseAttention.C1*:SparseAttention.C7*:KeySets.*"),
    (2, "the indexer gets no gradient", "model/attention/token_indexer.cc",
     "  if (!has_gradients_) return;\n", "  if (has_gradients_ || !has_gradients_) return;\n",
     "model_dsa_test", "IndexedLayer.C8D11*:Dsa.D8*"),
    (4, "the KL takes logarithms of p + eps", "kernels/indexer/body_kl.h",
     "const Value<T> term = target * (LogLanes(target) - (LoadLanes(x + i) - lse));",
     "const Value<T> softmax = ExpLanes(LoadLanes(x + i) - lse);\n    const T eps = static_cast<T>(1e-8);\n"
     "    const Value<T> term = target * (LogLanes(target + eps) - LogLanes(softmax + eps));",
     "model_indexer_test", "Indexer.D3*:Indexer.D9*:Golden.IndexerKl*"),
    (6, "decoding scores the newest key only", "model/attention/token_indexer.cc",
     "scores.first = &first;", "first = last;\n    scores.first = &first;",
     "model_dsa_test", "Gsa.G8*:IndexedLayer.C3*"),
    (8, "v32's indexer is rotated in the model's layout", "model/attention/dsa_indexer.cc",
     "rope_ = &ropes->HalfLayout(rotary_dims);", "rope_ = &ropes->Tables(rotary_dims);",
     "model_dsa_test", "Dsa.D12*"),
    (9, "GSA's indexer without 1/sqrt(dI)", "model/attention/gsa_indexer.cc",
     "rows.inputs.score_scale = 1.0 / std::sqrt(static_cast<double>(width_));", "rows.inputs.score_scale = 1.0;",
     "model_dsa_test", "Gsa.*"),
    (10, "the sliding mask is built, then dropped for is_causal", "model/attention/swa.cc",
     ("/*is_causal=*/false, MaskFor(q), scale_", "at::Tensor MaskFor("),
     ("/*is_causal=*/true, std::nullopt, scale_", "[[maybe_unused]] at::Tensor MaskFor("),
     "model_test", "SlidingWindow.S4S5*:SlidingWindow.S6*"),
    (11, "a window of W + 1 keys", "model/attention/key_sets.cc",
     "row - window.keys + 1)", "row - window.keys)",
     "model_sparse_test", "KeySets.S2*"),
    (12, "the ring of the decoder has one row too few", "model/inference/kv_cache.cc",
     "(position - shape_.sinks) % shape_.window;", "(position - shape_.sinks) % (shape_.window - 1);",
     "model_inference_test", "Decoder.C3*:KvCache.*"),
    (15, "decoding rotates every token as the first", "model/inference/decoder.cc",
     "int32_t position = static_cast<int32_t>(sequence->length);", "int32_t position = 0;",
     "model_inference_test", "Decoder.C3*"),
    (17, "compressed keys are rotated at j instead of j times the stride", "model/attention/nsa_compression.cc",
     "out.position.push_back(j * stride);", "out.position.push_back(j);",
     "model_nsa_test", "Nsa.Golden*"),
    (19, "blocks are ranked by mean logits instead of summed probabilities", "kernels/block_selection/body.h",
     "sum += Exp(Logits(queries + h * s.dim, key, s.dim) * scale - lse[h]);",
     "sum += (Logits(queries + h * s.dim, key, s.dim) * scale + 0.0f * lse[h]) * (1.0f / static_cast<float>(group_size));",
     "kernels_test", "BlockSelection.*"),
    (20, "only the current block is forced", "kernels/block_selection/body.h",
     ("inline void ChooseBlocks(const Shape& s, const float* score,", "  // candidates > n >= init + local:"),
     ("inline void ChooseBlocks(Shape s, const float* score,", "  if (s.local_blocks > 1) s.local_blocks = 1;\n  // candidates > n >= init + local:"),
     "kernels_test", "BlockSelection.*"),
    (21, "gates are halved as if they had to sum to 1", "model/attention/nsa_gates.cc",
     "const S g0 = Sigmoid(static_cast<S>(logit[0]));", "const S g0 = Sigmoid(static_cast<S>(logit[0])) / 2;",
     "model_nsa_test", "Nsa.N8*:Nsa.Golden*"),
    (22, "every decode step compresses again and throws the result away", "model/inference/nsa_cache.cc",
     "if (raw_rows_ < c.kernel_size) return;",
     "if (raw_rows_ < c.kernel_size) {\n    Emit(attention::OneWindow(c, windows_), raw_keys_.View(c.kernel_size), raw_values_.View(c.kernel_size));\n"
     "    --windows_;\n    return;\n  }",
     "model_inference_test", "*NsaCacheTest.N10*"),
    (25, "generation goes on after the end of text", "model/inference/generate.cc",
     "made->finish = Finish::kEos;", "made->finish = Finish::kEos;\n    return false;",
     "model_inference_test", "Generate.C12*"),
    (28, "heads of values are found by the width of keys", "kernels/sparse_attention/body.h",
     "return {p.v + j * p.value_dim, p.v_stride, p.value_dim};", "return {p.v + j * p.key_dim, p.v_stride, p.value_dim};",
     "model_sparse_test", "SparseAttention.C8*:SparseAttention.EqualsTheReference*"),
    (33, "the capacity is computed and ignored", "model/moe/dispatch.cc",
     "const int64_t kept = std::min(d->counts[e], capacity);", "capacity = std::max(capacity, d->counts[e]);\n    const int64_t kept = d->counts[e];",
     "model_moe_test", "Moe.E9*:Dispatch.Capacity*"),
    (34, "the balancing coefficient is applied twice", "model/moe/router.cc",
     "o.balance_coefficient = config.aux_loss();", "o.balance_coefficient = config.aux_loss() * config.aux_loss();",
     "model_moe_test", "Moe.E1The*:Router.*"),
    (35, "loads are counted again under recomputation", "model/layers/sublayer.h",
     "return pass == Pass::kTrain || pass == Pass::kSelect;", "return pass != Pass::kInference;",
     "model_moe_test", "Moe.C10*"),
    (36, "recomputation selects anew", "model/attention/token_indexer.cc",
     "if (context.pass == layers::Pass::kRecompute) {", "if (context.pass == layers::Pass::kRecompute && saved_ == nullptr) {",
     "model_dsa_test", "IndexedLayer.D10*:IndexedLayer.C10*"),
    (38, "the cast to e4m3 overflows to NaN", "kernels/kv_quant/body.h",
     ("const U16 bits = BitsOf(Clamp(quotient, 448.0f));", "*scale = ScaleOf(Max(largest), e4m3 ? 448.0f : 127.0f,"),
     ("const U16 bits = BitsOf(quotient);", "*scale = ScaleOf(Max(largest), e4m3 ? 512.0f : 127.0f,"),
     "kernels_test", "KvQuant.*"),
    (41, "an option is accepted and not read", "model/attention/adaptive_k.cc",
     "temperature_(config.adaptive_k_temperature())", "temperature_(1.0)",
     "model_properties_test", "ConfigEffect.EveryKey*"),
]


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def run(command, timeout=1800, **more):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, **more)


def copy_sources():
    """The tracked files as they are in the working tree, in a folder that keeps its build."""
    os.makedirs(SOURCES, exist_ok=True)
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], stdout=subprocess.PIPE, check=True).stdout
    wanted = [f for f in listed.decode().split("\0") if f and os.path.exists(os.path.join(ROOT, f))]
    for name in wanted:
        source, target = os.path.join(ROOT, name), os.path.join(SOURCES, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(source, "rb") as file:
            data = file.read()
        if not os.path.exists(target) or open(target, "rb").read() != data:
            shutil.copy(source, target)


def build(targets):
    return run(["ninja", "-C", os.path.join(SOURCES, "build"), *targets])


def fails(target, names):
    """The tests that fail; every name of the filter must exist."""
    program = os.path.join(SOURCES, "build", "tests", target)
    env = dict(os.environ, OMP_NUM_THREADS="2", GOMP_SPINCOUNT="1000")
    done = run([program, f"--gtest_filter={names}"], env=env, cwd=SOURCES)
    count = sum(line.startswith("[ RUN") for line in done.stdout.splitlines())
    failed = sorted({line.split("]", 1)[1].split("(")[0].strip().rstrip(",") for line in done.stdout.splitlines()
                     if line.startswith("[  FAILED  ]") and "." in line and "listed" not in line})
    if done.returncode == -signal.SIGABRT and "check failed" in done.stdout:
        # One of our own checks, in the test that was running.
        running = [line.split("]", 1)[1].strip() for line in done.stdout.splitlines() if line.startswith("[ RUN")]
        failed.append(f"{running[-1]} (a check ended the program)")
    return count, failed


def plant(mutant):
    number, what, name, old, new, target, names = mutant
    path = os.path.join(SOURCES, name)
    with open(path, encoding="utf-8") as file:
        text = mutated = file.read()
    for there, here in zip((old,) if isinstance(old, str) else old, (new,) if isinstance(new, str) else new):
        if there not in mutated:
            return {"bug": number, "what": what, "verdict": "PLACE GONE", "tests": []}
        mutated = mutated.replace(there, here)
    with open(path, "w", encoding="utf-8") as file:
        file.write(mutated)
    try:
        made = build([target])
        if made.returncode != 0:
            return {"bug": number, "what": what, "verdict": "DOES NOT COMPILE", "tests": made.stdout.splitlines()[-5:]}
        count, failed = fails(target, names)
        verdict = "NO SUCH TEST" if count == 0 else "caught" if failed else "NOT CAUGHT"
        return {"bug": number, "what": what, "verdict": verdict, "tests": failed}
    finally:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def check():
    """Every place exists: the list follows the code."""
    gone = []
    for number, what, name, old, *_ in MUTANTS:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            text = file.read()
        gone += [f"{number}: {name}: {what}" for there in ((old,) if isinstance(old, str) else old) if there not in text]
    for line in gone:
        print(f"place gone: {line}")
    print(f"{len(MUTANTS)} mutants, {len(gone)} places gone")
    sys.exit(1 if gone else 0)


def main():
    if "--check" in sys.argv:
        check()
    only = {int(n) for n in option("--only", "").split(",") if n}
    mutants = [m for m in MUTANTS if not only or m[0] in only]
    copy_sources()
    if not os.path.exists(os.path.join(SOURCES, "build", "build.ninja")):
        made = run(["cmake", "--preset", "dev"], cwd=SOURCES)
        if made.returncode != 0:
            sys.exit(made.stdout[-3000:])
    targets = sorted({m[5] for m in mutants})
    made = build(targets)
    if made.returncode != 0:
        sys.exit(made.stdout[-3000:])
    for target in targets:
        names = ":".join(m[6] for m in mutants if m[5] == target)
        count, failed = fails(target, names)
        if failed or not count:
            sys.exit(f"mutants: {target} fails without any mutant: {failed}")
    results = []
    for mutant in mutants:
        start = time.monotonic()
        result = plant(mutant)
        results.append(result)
        print(f"{result['bug']:3d} {result['verdict']:16s} {result['what']}  [{time.monotonic() - start:.0f} s]", flush=True)
        for test in result["tests"][:3]:
            print(f"      {test}", flush=True)
    caught = sum(r["verdict"] == "caught" for r in results)
    print(json.dumps({"mutants": len(results), "caught": caught}))
    if "--keep" not in sys.argv:
        shutil.rmtree(WORK)
    sys.exit(0 if caught == len(results) else 1)


main()
