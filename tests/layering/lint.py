#!/usr/bin/env python3
"""The slow checks of `./dev lint`: every header compiles alone, clang-tidy finds nothing.

usage: lint.py [--all] [FILE...]   files that differ from origin/main by default; --all: every file
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.join(ROOT, "build")


def git(*args):
    done = subprocess.run(["git", *args], cwd=ROOT, text=True, capture_output=True)
    return [line for line in done.stdout.split("\n") if line] if done.returncode == 0 else []


def wanted(argv):
    if argv and argv[0] != "--all":
        return [os.path.relpath(os.path.abspath(f), ROOT) for f in argv]
    if not argv:
        base = git("merge-base", "HEAD", "origin/main")
        if base:
            changed = git("diff", "--name-only", base[0]) + git("ls-files", "-o", "--exclude-standard")
            return sorted({p for p in changed if os.path.exists(os.path.join(ROOT, p))})
    return git("ls-files", "-co", "--exclude-standard")


def flags_by_folder(commands):
    """The -I, -isystem, -D and -std flags of the folder's translation unit that sees most (a folder may hold parts with
    and without LibTorch)."""
    flags = {}
    for entry in commands:
        folder = os.path.relpath(os.path.dirname(entry["file"]), ROOT)
        kept = re.findall(r"(?<=\s)(?:-I\s*\S+|-isystem \S+|-D\S+|-std=\S+|-m\S+)", entry["command"])
        kept = [part for flag in kept for part in flag.split()]
        if len(kept) > len(flags.get(folder, [])):
            flags[folder] = kept
    return flags


def without_precompiled(commands):
    """A compilation database for clang-tidy, which reads no precompiled header of GCC: its folder. What a file forgets to
    include shows here, too."""
    folder = os.path.join(BUILD, "lint")
    os.makedirs(folder, exist_ok=True)
    plain = [{**entry, "command": re.sub(r"-include \S*cmake_pch\S*|-Winvalid-pch", "", entry["command"])} for entry in commands]
    with open(os.path.join(folder, "compile_commands.json"), "w", encoding="utf-8") as f:
        json.dump(plain, f)
    return folder


def compile_alone(path, flags):
    done = subprocess.run(["c++", "-x", "c++", "-fsyntax-only", "-Wall", *flags, "-include", path, "/dev/null"], cwd=ROOT,
                          text=True, capture_output=True)
    return "" if done.returncode == 0 else f"{path}: does not compile alone:\n{done.stderr[:2000]}"


def tidy(path, database):
    done = subprocess.run(["clang-tidy-14", "-p", database, "--quiet", "--extra-arg=-Wno-unknown-warning-option", path], cwd=ROOT, text=True, capture_output=True)
    return "" if done.returncode == 0 and "warning:" not in done.stdout else done.stdout + done.stderr


def main():
    files = wanted(sys.argv[1:])
    with open(os.path.join(BUILD, "compile_commands.json"), encoding="utf-8") as f:
        commands = json.load(f)
    flags = flags_by_folder(commands)
    database = without_precompiled(commands)
    compiled = {os.path.relpath(entry["file"], ROOT) for entry in commands}
    headers = [f for f in files if f.endswith(".h") and os.path.dirname(f) in flags]
    sources = [f for f in files if f in compiled and f.endswith(".cc")]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = [*pool.map(lambda p: compile_alone(p, flags[os.path.dirname(p)]), headers), *pool.map(lambda p: tidy(p, database), sources)]
    found = [text for text in results if text]
    for text in found:
        print(text)
    print(f"lint: {len(headers)} headers alone, {len(sources)} files through clang-tidy, {len(found)} with findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
