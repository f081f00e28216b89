#!/usr/bin/env bash
# ./dev bench [NAME...]: runs the named benchmarks, or all. Results: bench/results/NAME.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONDONTWRITEBYTECODE=1
names=("$@")
if [ ${#names[@]} -eq 0 ]; then names=(tokenizer optimizer experts recompute collectives plan scheduling checkpoint spine training attention attention_kinds lengths); fi
for name in "${names[@]}"; do
  if [ ! -f "bench/$name.py" ]; then
    echo "bench: no benchmark '$name'; there are: tokenizer optimizer experts recompute collectives plan scheduling checkpoint spine training attention attention_kinds lengths" >&2
    exit 2
  fi
done
for name in "${names[@]}"; do
  echo "== $name"
  python3 "bench/$name.py"
done
