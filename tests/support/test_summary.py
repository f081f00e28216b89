#!/usr/bin/env python3
"""Sums up a CTest run from its JUnit file: what ran, what was skipped and why, what failed.

usage: test_summary.py JUNIT_FILE
"""

import re
import sys
import xml.etree.ElementTree as ElementTree

GTEST_SKIP = re.compile(r"^\S+:\d+: Skipped\n(.*)$", re.MULTILINE)
SCRIPT_SKIP = re.compile(r"^SKIPPED:? ?(.*)$", re.MULTILINE)
CASES = re.compile(r"^\[==========\] (\d+) tests? from .* ran\.", re.MULTILINE)


def main():
    root = ElementTree.parse(sys.argv[1]).getroot()
    passed, failed, skipped, cases = 0, [], [], 0
    for case in root.iter("testcase"):
        output = case.findtext("system-out") or ""
        cases += sum(int(number) for number in CASES.findall(output))
        reasons = GTEST_SKIP.findall(output) + SCRIPT_SKIP.findall(output)
        status = case.get("status")
        if status == "fail" or case.find("failure") is not None:
            failed.append(case.get("name"))
            continue
        whole = case.find("skipped") is not None or status in ("notrun", "disabled")
        passed += not whole
        if whole or reasons:
            kind = "skipped" if whole else "skipped in part"
            for reason in sorted(set(reasons)) or [(case.find("skipped").get("message") if whole else "")]:
                skipped.append((case.get("name"), kind, reason.strip()))
    print(f"\n{passed} test programs passed ({cases} cases), {len(failed)} failed, "
          f"{sum(kind == 'skipped' for _, kind, _ in skipped)} skipped")
    for name, kind, reason in skipped:
        print(f"  {kind}: {name}: {reason}")
    for name in failed:
        print(f"  FAILED: {name}")


if __name__ == "__main__":
    main()
