#!/usr/bin/env python3
"""No test disappears unseen (architecture T3): every tested folder keeps at least its recorded number of tests.

The floors are in test_counts.txt. UPDATE_GOLDEN=1 raises them to today's numbers; lowering one is an edit that a
reviewer sees. A folder without a floor needs one as soon as it has tests.
"""

import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
FLOORS = os.path.join(HERE, "test_counts.txt")
CASE = re.compile(r"^(?:TEST|TEST_F|TEST_P|TYPED_TEST|RC_GTEST_PROP|RC_GTEST_FIXTURE_PROP)\s*\(", re.MULTILINE)
HEADER = "# At least this many tests in each folder; raise with UPDATE_GOLDEN=1 (test_count_test.py).\n"


def count(root):
    """{folder: number of tests}, folders relative to `root`."""
    counts = {}
    for folder, _, files in os.walk(root):
        for name in files:
            if name.endswith((".cc", ".cu")):
                with open(os.path.join(folder, name), encoding="utf-8") as f:
                    number = len(CASE.findall(f.read()))
            else:
                number = int(name.endswith(("_test.py", "_test.sh")))
            if number:
                key = os.path.relpath(folder, root)
                counts[key] = counts.get(key, 0) + number
    return counts


def parse(text):
    return {line.split()[0]: int(line.split()[1]) for line in text.splitlines() if line and not line.startswith("#")}


def compare(floors, counts):
    problems = []
    for folder in sorted(floors.keys() | counts.keys()):
        have, want = counts.get(folder, 0), floors.get(folder)
        if want is None:
            problems.append(f"tests/{folder}: {have} tests without a floor: UPDATE_GOLDEN=1 {os.path.basename(__file__)}")
        elif have < want:
            problems.append(f"tests/{folder}: {have} tests, there were {want}")
    return problems


def self_test():
    text = "TEST(A, B) {\n}\nTEST_F(A, C) {\n}\n// TEST(A, D) {}\n  TEST(x);\n"
    if len(CASE.findall(text)) != 2:
        raise SystemExit("self-test: counted wrongly")
    if len(compare({"a": 2, "b": 1, "c": 1}, {"a": 1, "b": 5, "d": 1})) != 3:
        raise SystemExit("self-test: a lost test was not found")


def main():
    self_test()
    counts = count(TESTS)
    with open(FLOORS, encoding="utf-8") as f:
        floors = parse(f.read())
    if os.environ.get("UPDATE_GOLDEN"):
        floors = {folder: max(number, floors.get(folder, 0)) for folder, number in counts.items()}
        with open(FLOORS, "w", encoding="utf-8") as f:
            f.write(HEADER + "".join(f"{folder} {number}\n" for folder, number in sorted(floors.items())))
    problems = compare(floors, counts)
    for problem in problems:
        print(problem)
    print(f"{sum(counts.values())} tests in {len(counts)} folders, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
