#!/usr/bin/env python3
"""Compares every #include with allowed_dependencies.txt (architecture L3, L4).

Prints one line per forbidden include and exits 1. First tests itself on planted bad input: a rule that
stops finding its violation fails this test.
"""

import fnmatch
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TABLE = os.path.join(HERE, "allowed_dependencies.txt")
SOURCE = re.compile(r"\.(h|cc|cu|cuh)$")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)

# Folders of B: open to everyone that lists B; base itself holds word lists (.def).
BASE = ["base", "base/status", "base/ids", "base/units", "base/clock", "base/rng", "base/log", "base/numa",
        "base/rank_words"]
# Tests may include what they test; only L4 binds them.
UNRESTRICTED = ("tests/",)

STD = set("""
algorithm any array atomic barrier bit bitset cassert cctype cerrno cfenv cfloat charconv chrono cinttypes climits
clocale cmath codecvt compare complex concepts condition_variable coroutine csetjmp csignal cstdarg cstddef cstdint
cstdio cstdlib cstring ctime cwchar deque exception execution filesystem format forward_list fstream functional future
initializer_list iomanip ios iosfwd iostream istream iterator latch limits list locale map memory memory_resource mutex
new numbers numeric optional ostream queue random ranges ratio regex scoped_allocator semaphore set shared_mutex
source_location span sstream stack stdexcept stop_token streambuf string string_view syncstream system_error thread
tuple type_traits typeindex typeinfo unordered_map unordered_set utility valarray variant vector version
""".split())

GROUPS = [
    ("absl", r"absl/"),
    ("protobuf", r"google/protobuf/"),
    ("grpc", r"(grpcpp|grpc)/"),
    ("asio", r"boost/"),
    ("openssl", r"openssl/"),
    ("rocksdb", r"rocksdb/"),
    ("torch", r"(ATen|c10|caffe2|torch)/"),
    ("gloo", r"gloo/"),
    ("mpi", r"mpi\.h$"),
    ("pmix", r"pmix(_server)?\.h$"),
    ("nccl", r"nccl\.h$"),
    ("cuda", r"(cuda|cub|cooperative_groups|mma|cublas|nvml)[^/]*(\.h|\.hpp|\.cuh)?(/|$)"),
    ("intrinsics", r"(\w*intrin|cpuid)\.h$"),
    ("yaml", r"yaml-cpp/"),
    ("nlohmann", r"nlohmann/"),
    ("cli", r"CLI/"),
    ("zstd", r"zstd(_errors)?\.h$"),
    ("simdjson", r"simdjson\.h$"),
    ("pcre2", r"pcre2\.h$"),
    ("xxhash", r"xxhash\.h$"),
    ("spdlog", r"(spdlog|fmt)/"),
    ("ncurses", r"(ncurses|curses|term)\.h$"),
    ("uring", r"liburing"),
    ("gtest", r"(gtest|gmock|rapidcheck)(/|\.h$)"),
    ("posix", r"((sys|linux|netinet|arpa|asm|net|bits)/[\w/-]+\.h|\w+\.h)$"),
]


def group_of(header):
    """The group of an external header, None if unknown."""
    if header in STD:
        return "std"
    for name, pattern in GROUPS:
        if re.match(pattern, header):
            return name
    return None


def read_table(text):
    """[(unit pattern, [ours], [others])]"""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        cells = [cell.split() for cell in line.split("|")]
        if len(cells) != 3 or len(cells[0]) != 1:
            raise SystemExit(f"allowed_dependencies.txt:{number}: want 'unit | ours | others'")
        ours, others = ([c for c in cell if c != "-"] for cell in cells[1:])
        known = {name for name, _ in GROUPS} | {"std", "*"}
        for other in others:
            if other not in known:
                raise SystemExit(f"allowed_dependencies.txt:{number}: unknown group {other}")
        rows.append((cells[0][0], ours, others))
    return rows


def row_of(rows, path):
    """The row of a file: a pattern of the file itself before the longest pattern of its folder."""
    folder = os.path.dirname(path)
    best = None
    for row in rows:
        unit = row[0]
        if fnmatch.fnmatchcase(path, unit) and unit.count("/") == path.count("/"):
            score = 1000 + len(unit)
        elif fnmatch.fnmatchcase(folder, unit) and unit.count("/") == folder.count("/"):
            score = len(unit)
        else:
            continue
        if best is None or score > best[0]:
            best = (score, row)
    return best[1] if best else None


def may_use_ours(ours, own_folder, header):
    if header.startswith("heddle/v1/"):
        wanted = "proto_grpc" if header.endswith(".grpc.pb.h") else "proto"
        return wanted in ours or "proto_grpc" in ours or "*" in ours
    folder = os.path.dirname(header)
    if folder == own_folder:
        return True
    for entry in ours:
        if entry in ("*", folder, header) or (entry == "B" and folder in BASE):
            return True
        if entry.endswith("/*") and folder.startswith(entry[:-1]):
            return True
    return False


def check_file(rows, path, text):
    """Lines 'path:line: problem' for one file."""
    problems = []
    groups = set()
    row = row_of(rows, path)
    free = path.startswith(UNRESTRICTED)
    if row is None and not free:
        return [f"{path}:1: no row in allowed_dependencies.txt covers this file"]
    for match in INCLUDE.finditer(text):
        line = text.count("\n", 0, match.start(1) if match.group(1) else match.start(2)) + 1
        where = f"{path}:{line}"
        ours, external = match.group(1), match.group(2)
        header = ours or external
        is_ours = header.split("/")[0] in OUR_ROOTS and "/" in header
        if is_ours:
            if external:
                problems.append(f"{where}: write \"{header}\" in quotes")
            if header.endswith(".grpc.pb.h"):
                groups.add("grpc")
            if not free and not may_use_ours(row[1], os.path.dirname(path), header):
                problems.append(f"{where}: {row[0]} may not include {header}")
            continue
        if ours and os.path.exists(os.path.join(ROOT, os.path.dirname(path), header)):
            problems.append(f"{where}: {header}: includes are relative to the repository's root")
            continue
        group = group_of(header)
        if group is None:
            problems.append(f"{where}: {header} is in no group of include_rules_test.py")
            continue
        groups.add(group)
        if not free and group != "std" and group not in row[2] and "*" not in row[2]:
            problems.append(f"{where}: {row[0]} may not include {header} ({group})")
    if {"grpc", "torch"} <= groups:
        problems.append(f"{path}:1: gRPC and LibTorch never meet in one file")
    return problems


OUR_ROOTS = {"base", "data", "kernels", "checkpoint", "model", "coordinator", "worker", "cli", "bench", "tests",
             "heddle"}


def self_test(rows):
    """Every rule must find its planted violation, and clean input must stay clean."""
    planted = [
        ("coordinator/state/x.cc", '#include "worker/daemon/task.h"\n', "may not include worker/daemon/task.h"),
        ("coordinator/state/x.cc", "#include <sys/stat.h>\n", "(posix)"),
        ("kernels/adamw/x.cc", '#include "base/status/status.h"\n', "may not include base/status"),
        ("kernels/adamw/x.cc", "#include <ATen/ATen.h>\n", "(torch)"),
        ("worker/shim/main.cc", '#include "heddle/v1/control.pb.h"\n', "may not include heddle/v1"),
        ("worker/control/control_frame.h", "#include <boost/asio/post.hpp>\n", "(asio)"),
        ("worker/trainer/x.cc", '#include "heddle/v1/jobs.grpc.pb.h"\n', "may not include heddle/v1/jobs.grpc"),
        ("base/ids/x.h", '#include "base/log/log.h"\n', "may not include base/log/log.h"),
        ("base/ids/x.h", "#include <base/status/status.h>\n", "in quotes"),
        ("base/ids/x.h", "#include <surprise/thing.h>\n", "in no group"),
        ("newpart/x.cc", "int x;\n", "no row"),
        ("tests/x_test.cc", "#include <torch/torch.h>\n#include <grpcpp/grpcpp.h>\n", "never meet"),
        ("model/layers/x.cc", '#  include  "model/language_model.h"\n', "may not include model/language_model.h"),
        ("tests/layering/x.cc", '#include "include_rules_test.py"\n', "relative to the repository's root"),
    ]
    for path, text, wanted in planted:
        found = check_file(rows, path, text)
        if not any(wanted in line for line in found):
            raise SystemExit(f"self-test: planted {text!r} in {path} gave {found}, want '{wanted}'")
    clean = [
        ("coordinator/rpc/x.cc", '#include <grpcpp/grpcpp.h>\n#include "coordinator/state/state.h"\n'),
        ("worker/comm/x_cuda.cc", "#include <nccl.h>\n#include <torch/torch.h>\n"),
        ("kernels/adamw/avx2.cc", '#include <immintrin.h>\n#include "kernels/adamw/params.h"\n'),
        ("base/log/log.cc", '// #include "worker/daemon/x.h"\n#include "base/status/status.h"\n'),
    ]
    for path, text in clean:
        found = check_file(rows, path, text)
        if found:
            raise SystemExit(f"self-test: clean input in {path} gave {found}")


def main():
    with open(TABLE, encoding="utf-8") as f:
        rows = read_table(f.read())
    self_test(rows)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, check=True,
                            capture_output=True).stdout.split("\n")
    problems = []
    count = 0
    for path in sorted(p for p in listed if SOURCE.search(p)):
        full = os.path.join(ROOT, path)
        if not os.path.exists(full):
            continue
        with open(full, encoding="utf-8") as f:
            problems += check_file(rows, path, f.read())
        count += 1
    for problem in problems:
        print(problem)
    print(f"{count} files, {len(problems)} problems")
    return 1 if problems or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
