#!/usr/bin/env python3
"""Style rules that a machine can check (architecture S9, S13, S17, S18, S33, H2, T5).

Prints one line per finding, with what to write instead, and exits 1. First tests itself on planted bad input.
"""

import ast
import os
import re
import subprocess
import sys

from cpp_scanner import functions, strip_comments_and_strings

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 70
MAX_README_LINES = 60
MAX_WHY_LINES = 10

CPP = re.compile(r"\.(h|cc|cu|cuh)$")
TEXT = re.compile(r"(\.(h|cc|cu|cuh|py|sh|md|cmake|txt|proto|yaml|yml|json|service)|CMakeLists\.txt|Dockerfile|/dev)$")
DATA = re.compile(r"^(tests/golden|tests/fuzz/corpus|bench/results)/|\.jsonl$|^docs/config\.schema\.json$")
MIRRORED = re.compile(r"^tests/(?!(e2e|layering|support|simulation|scenarios|golden|fuzz)$)")

# (pattern, what to write instead, files where it is right). Searched in code, not in comments or strings.
BANNED = [
    (r"\bstd::cout\b", "HEDDLE_INFO, or the printers of cli/output", r"^(cli|bench|tests)/|^model/tool/|/main\.cc$"),
    (r"\bstd::cerr\b", "HEDDLE_ERROR, or the printers of cli/output", r"^(cli|bench|tests)/|^model/tool/|/main\.cc$"),
    (r"\bstd::endl\b", "'\\n'", None),
    (r"\bsleep_for\b|\bsleep_until\b|\busleep\s*\(", "a timer of the event loop, or Clock and a condition",
     r"^(tests|bench|cli)/|^worker/(shim|trainer|comm)/"),
    (r"\b(system|steady|high_resolution)_clock::now\b", "Clock of base/clock",
     r"^(tests|bench|kernels)/|^worker/(shim|comm)/|^worker/control/rank_link\.cc$|^coordinator/runtime/main\.cc$"),
    (r"\bgettimeofday\s*\(|\bstd::time\s*\(|[^_\w.>]time\s*\(\s*(NULL|nullptr|0)\s*\)", "Clock of base/clock", None),
    (r"\bs?rand\s*\(|\bstd::random_device\b|\bstd::mt19937(_64)?\b|\bstd::default_random_engine\b",
     "Rng of base/rng", r"^tests/"),
    (r"\bsprintf\s*\(|\bstrcpy\s*\(|\bstrcat\s*\(|\bstrtok\s*\(|\bgets\s*\(", "std::string, Str() or snprintf", None),
    (r"\bstd::system\s*\(|[^_\w.>:]system\s*\(|\bpopen\s*\(", "posix_spawn or fork and exec with an argument vector",
     None),
    (r"\bato[ilf]\s*\(|\bstrto(l|ll|ul|ull)\s*\(|\bstd::sto(i|l|ll|ul|ull)\s*\(", "std::from_chars", r"^(worker/shim|tests)/"),
    (r"\busing namespace std\s*;", "std:: before the name", None),
    (r"\bassert\s*\(", "HEDDLE_CHECK (static_assert at compile time)", r"^kernels/"),
    # The body of a child process that a test starts is a disabled test of a suite named *Child.
    (r"(?<!Child, )\bDISABLED_\w", "a test that runs, or GTEST_SKIP with the reason", None),
    (r"\b\w+_(milliseconds|millis|msecs?)\b", "_ms, the one spelling of milliseconds", None),
    (r"\b\w+_(usecs?|micros|microseconds)\b", "_us, the one spelling of microseconds", None),
    (r"\b(?!tv_|gpr_)\w+_(nanos|nsecs?|nanoseconds)\b", "_ns, the one spelling of nanoseconds", None),
    # yaml-cpp's event handlers can stop a parse only by throwing.
    (r"\bthrow\b(?!\s*\()", "Status (we throw nothing, S25)", r"^tests/|^base/settings/yaml_reader\.cc$"),
    (r"\bcatch\s*\(\s*\.\.\.\s*\)", "the exception's type; only mains catch everything",
     r"/(main|step_loop|train_loop|bootstrap)\.cc$|^checkpoint/tensor_io/|^tests/"),
]
# Searched in whole lines of every text file, comments included.
BANNED_ANYWHERE = [
    (r"\bFIXME\b|\bXXX\b", "fix it, or TODO(condition)", r"^tests/layering/"),
    (r"\bTODO\b(?!\()", "TODO(condition): what then", r"^tests/layering/"),
]


def check_lengths(path, text):
    problems = []
    lines = text.count("\n")
    if lines > MAX_FILE_LINES and not path.endswith(".md"):
        problems.append(f"{path}:1: {lines} lines, at most {MAX_FILE_LINES}: split it by what it does")
    spans = []
    if CPP.search(path):
        spans = functions(text)
    elif path.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                spans.append((node.name, node.lineno, node.end_lineno))
    for name, first, last in spans:
        length = last - first + 1
        if length > MAX_FUNCTION_LINES:
            problems.append(f"{path}:{first}: {name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return problems


def check_words(path, text):
    problems = []
    code = strip_comments_and_strings(text) if CPP.search(path) else ""
    for source, rules in ((code, BANNED), (text, BANNED_ANYWHERE)):
        for pattern, instead, right_in in rules:
            if right_in and re.search(right_in, path):
                continue
            for match in re.finditer(pattern, source):
                line = source.count("\n", 0, match.start()) + 1
                problems.append(f"{path}:{line}: {match.group(0).strip()}: write {instead}")
    return problems


def check_coroutines(path, text):
    """S33: g++ 12 destroys aggregate temporaries of a co_await expression twice."""
    problems = []
    for number, line in enumerate(strip_comments_and_strings(text).splitlines(), 1):
        if not re.search(r"\bco_await\b", line):
            continue
        after = line[line.index("co_await"):].rstrip()
        after = after[:-1] if after.endswith("{") else after
        if "{" in after or "?" in line:
            problems.append(f"{path}:{number}: no braces and no ?: with co_await: name the value first")
    return problems


def check_header(path, text):
    problems = []
    if "#pragma once" not in text:
        problems.append(f"{path}:1: no #pragma once")
    why = re.match(r"(?://[^\n]*\n)+", text)
    if not why:
        problems.append(f"{path}:1: a header starts with a comment that says why it is there")
        return problems
    # Numbered invariants stand at the file's top too (S15); they do not count.
    length = why.group(0).split("Invariants:")[0].count("\n")
    if length > MAX_WHY_LINES:
        problems.append(f"{path}:1: the opening comment has {length} lines, "
                        f"at most {MAX_WHY_LINES}: move details to the declarations or README.md")
    return problems


def check_layout(path, text):
    problems = []
    if text and not text.endswith("\n"):
        problems.append(f"{path}:{text.count(chr(10)) + 1}: no newline at the end of the file")
    for number, line in enumerate(text.split("\n"), 1):
        if line != line.rstrip() and not path.endswith(".md"):
            problems.append(f"{path}:{number}: blanks at the end of the line")
        if "\t" in line and not path.endswith((".md", ".sh")):
            problems.append(f"{path}:{number}: a tab")
    return problems


def check_readme(path, text):
    problems = []
    lines = text.rstrip("\n").split("\n")
    fenced = False
    titles = 0
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        titles += not fenced and line.startswith("# ")
    if titles != 1:
        problems.append(f"{path}:1: {titles} titles (# ...), want one")
    if len(lines) > MAX_README_LINES and "/" in path:
        problems.append(f"{path}:1: {len(lines)} lines, at most {MAX_README_LINES}")
    return problems


def check_file(path, text):
    problems = check_lengths(path, text) + check_words(path, text) + check_layout(path, text)
    if CPP.search(path):
        problems += check_coroutines(path, text)
    if path.endswith(".h"):
        problems += check_header(path, text)
    if path.endswith("README.md"):
        problems += check_readme(path, text)
    return problems


def parents_of(folders):
    """All folders above these, but not the root."""
    parents = set()
    for folder in folders:
        while folder := os.path.dirname(folder):
            parents.add(folder)
    return parents


def check_tree(paths, read):
    """What only the whole tree shows: folders without README, headers nobody includes."""
    problems = []
    folders = {os.path.dirname(p) for p in paths if CPP.search(p) or p.endswith((".py", ".sh", ".proto"))}
    for folder in sorted(folders):
        if folder and not MIRRORED.match(folder) and f"{folder}/README.md" not in paths and "heddle/v1" not in folder:
            problems.append(f"{folder}: no README.md (purpose, what may enter, types, tests)")
    for folder in sorted(parents_of(folders) - folders):
        if not MIRRORED.match(folder) and f"{folder}/README.md" not in paths and folder != "proto/heddle":
            problems.append(f"{folder}: no README.md (purpose, what its folders hold, which way they depend, tests)")
    included = set()
    for path in paths:
        if CPP.search(path):
            included.update(re.findall(r'#\s*include\s+"([^"]+)"', read(path)))
    for path in sorted(paths):
        if path.endswith(".h") and path not in included:
            problems.append(f"{path}: a header nobody includes: delete it")
    return problems


def self_test():
    """Every rule must find its planted violation, and clean input must stay clean."""
    body = "  x = 1;\n"
    long_function = "int Long(int x) {\n" + body * 69 + "}\n"
    planted = [
        ("base/x.cc", "// a\n" * 801, "801 lines"),
        ("base/x.cc", "namespace a {\n" + long_function + "}\n", "Long has 71 lines"),
        ("base/x.cc", "struct A {\n  A() : b_{1} {\n" + body * 70 + "  }\n};\n", "A has 72 lines"),
        ("base/x.cc", "TEST(A, B) {\n" + body * 70 + "}\n", "TEST has 72 lines"),
        ("tools/x.py", "def f():\n" + "    x = 1\n" * 70, "f has 71 lines"),
        ("coordinator/x.cc", "void F() { std::cout << 1; }\n", "HEDDLE_INFO"),
        ("coordinator/x.cc", "auto t = std::chrono::system_clock::now();\n", "Clock of base/clock"),
        ("coordinator/x.cc", "std::this_thread::sleep_for(x);\n", "a timer"),
        ("coordinator/x.cc", "int y = rand();\n", "Rng of base/rng"),
        ("coordinator/x.cc", "int y = std::stoi(s);\n", "from_chars"),
        ("coordinator/x.cc", "int y = system(s);\n", "argument vector"),
        ("coordinator/x.cc", "assert(x);\n", "HEDDLE_CHECK"),
        ("coordinator/x.cc", "int wait_milliseconds = 3;\n", "_ms"),
        ("coordinator/x.cc", "throw std::bad_alloc();\n", "Status"),
        ("tests/x_test.cc", "TEST(A, DISABLED_B) {}\n", "GTEST_SKIP"),
        ("base/x.cc", "// FIX" "ME later\n", "fix it"),
        ("base/x.cc", "// TO" "DO: later\n", "TODO(condition)"),
        ("base/x.cc", "int x = co_await F(Opt{.a = 1});\n", "co_await"),
        ("base/x.cc", "int x = a ? co_await F(b) : 0;\n", "co_await"),
        ("base/x.h", "#pragma once\n", "says why"),
        ("base/x.h", "// why\nint x;\n", "#pragma once"),
        ("base/x.h", "// why\n" * 11 + "#pragma once\n", "11 lines, at most 10"),
        ("base/x.cc", "int x; \n", "blanks"),
        ("base/x.cc", "\tint x;\n", "a tab"),
        ("base/x.cc", "int x;", "no newline"),
        ("base/README.md", "text\n", "0 titles"),
        ("base/README.md", "# a\n" + "b\n" * 60, "61 lines, at most 60"),
    ]
    for path, text, wanted in planted:
        found = check_file(path, text)
        if not any(wanted in line for line in found):
            raise SystemExit(f"self-test: planted {text[:60]!r} in {path} gave {found}, want '{wanted}'")
    clean = [
        ("base/x.cc", '// std::cout, rand()\nconst char* a = "sleep_for(1) \\" rand()";\nint b = R"(rand())"[0];\n'),
        ("base/x.cc", "namespace a {\n" + "int F() {\n  return 1;\n}\n" * 90 + "}\n"),
        ("base/x.cc", "if (co_await F(named)) {\n"),
        ("base/README.md", "# a\n```\n# comment\n```\n"),
        ("base/x.cc", "int t = job.runtime(0);\nint y = operand(1);\n// TO" "DO(boost 1.85 in Debian): drop this\n"),
    ]
    for path, text in clean:
        found = check_file(path, text)
        if found:
            raise SystemExit(f"self-test: clean input in {path} gave {found}")
    files = {"base/a/x.h": "int x;\n", "base/b/y.cc": "int y;\n", "base/b/README.md": "# b\n",
             "model/README.md": "# model\n", "model/c/z.cc": "int z;\n", "model/c/README.md": "# c\n",
             "tests/model/d/z_test.cc": "int z;\n"}
    found = check_tree(set(files), files.get)
    if found != ["base/a: no README.md (purpose, what may enter, types, tests)",
                 "base: no README.md (purpose, what its folders hold, which way they depend, tests)",
                 "tests: no README.md (purpose, what its folders hold, which way they depend, tests)",
                 "base/a/x.h: a header nobody includes: delete it"]:
        raise SystemExit(f"self-test: planted tree gave {found}")


def main():
    self_test()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, check=True,
                            capture_output=True).stdout.split("\n")
    paths = {p for p in listed if p and os.path.exists(os.path.join(ROOT, p)) and not DATA.search(p)}

    def read(path):
        with open(os.path.join(ROOT, path), encoding="utf-8") as f:
            return f.read()

    problems = check_tree(paths, read)
    checked = sorted(p for p in paths if TEXT.search("/" + p))
    for path in checked:
        problems += check_file(path, read(path))
    for problem in problems:
        print(problem)
    print(f"{len(checked)} files, {len(problems)} problems")
    return 1 if problems or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
