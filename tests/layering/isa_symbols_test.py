#!/usr/bin/env python3
"""Objects compiled for one instruction set export no shared inline code (architecture T12).

An inline function of a shared header that is compiled with AVX-512 flags becomes a weak symbol; the linker may
keep that copy for the whole program, which then crashes on an older host. So the objects of avx2.cc, avx512.cc,
amx.cc .. must define no weak function and no function but their launchers.
usage: isa_symbols_test.py LIBRARY.a...
"""

import os
import re
import subprocess
import sys
import tempfile

ISA_OBJECT = re.compile(r"(^|_)(avx2|avx512|amx)(_\w+)?\.cc\.o$")
WEAK = re.compile(r"^[0-9a-f]+ [WVu] ")


def weak_symbols(listing):
    """[(object, symbol)] of `nm -A`-less output with 'name:' headings."""
    found = []
    member = ""
    for line in listing.splitlines():
        if line.endswith(".o:"):
            member = line[:-1]
        elif ISA_OBJECT.search(member) and WEAK.match(line):
            found.append((member, line.split(" ", 2)[2]))
    return found


def nm(path):
    return subprocess.run(["nm", "--defined-only", "-C", path], check=True, text=True, capture_output=True).stdout


def self_test():
    """A real object with an inline function must be found, one with everything anonymous must not."""
    with tempfile.TemporaryDirectory() as folder:
        planted = {"bad_avx2": "inline int Shared(int x) { return x * 3; }\nint (*Launch())(int) { return Shared; }\n",
                   "good_avx2": "namespace { int Own(int x) { return x * 3; } }\nint (*Launch())(int) { return Own; }\n"}
        for name, code in planted.items():
            source = os.path.join(folder, name + ".cc")
            with open(source, "w", encoding="utf-8") as f:
                f.write(code)
            subprocess.run(["c++", "-c", "-O0", source, "-o", source + ".o"], check=True)
            library = os.path.join(folder, name + ".a")
            subprocess.run(["ar", "rcs", library, source + ".o"], check=True)
            found = [symbol for _, symbol in weak_symbols(nm(library))]
            if found != (["Shared(int)"] if name.startswith("bad") else []):
                raise SystemExit(f"self-test: {name} gave {found}")


def main():
    self_test()
    problems = 0
    objects = 0
    for library in sys.argv[1:]:
        listing = nm(library)
        objects += sum(1 for line in listing.splitlines() if line.endswith(".o:") and ISA_OBJECT.search(line[:-1]))
        for member, symbol in weak_symbols(listing):
            print(f"{os.path.basename(library)}({member}): {symbol}: put it into an anonymous namespace")
            problems += 1
    print(f"{objects} objects, {problems} problems")
    return 1 if problems or (sys.argv[1:] and not objects) else 0


if __name__ == "__main__":
    sys.exit(main())
