#!/usr/bin/env python3
"""T2: SIGKILL at every file-system call of a checkpoint commit, then load what is there.

Counts the calls of one commit with strace, then runs it once for each kind of call and each number k
with the k-th such call killed (strace counts k per kind and thread). After each kill every committed
checkpoint must load with the right values, an acknowledged one must be there, and the next attempt
must be able to save. Ends with {"kill_points":N,"torn":0,"loadable":N}.

Calls that change nothing on disk (open, close) are killed at every fourth only; --all kills each.
"""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

PROBE = os.path.join(os.environ.get("HEDDLE_BIN", "build/bin"), "..", "tests", "commit_probe")
KINDS = ("open,openat,creat,mkdir,mkdirat,write,pwrite64,writev,sync_file_range,fdatasync,fsync,close,unlink,unlinkat,"
         "rename,renameat,renameat2,fallocate,ftruncate,link,linkat").split(",")


HARMLESS = ("open", "openat", "close")


def skip(reason):
    print(f"SKIPPED: {reason}")
    sys.exit(77)


def start_stopped(folder):
    """The probe before its first byte, stopped."""
    probe = subprocess.Popen([PROBE, "save", folder, "2", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.waitid(os.P_PID, probe.pid, os.WSTOPPED | os.WNOWAIT)
    return probe


def traced(folder, strace_args):
    """Attaches strace to a stopped probe, lets it run; returns (stdout, return code)."""
    probe = start_stopped(folder)
    tracer = subprocess.Popen(["strace", "-f", *strace_args, "-p", str(probe.pid)], stderr=subprocess.PIPE, text=True)
    for line in tracer.stderr:
        if "attached" in line:
            break
        if "Operation not permitted" in line or "ptrace" in line:
            probe.kill()
            skip("strace may not attach here")
    os.kill(probe.pid, signal.SIGCONT)
    try:
        out, _ = probe.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        probe.kill()
        raise
    tracer.communicate(timeout=60)
    return out, probe.returncode


def known_kinds():
    """The kinds that this machine's strace knows."""
    kinds = []
    for kind in KINDS:
        done = subprocess.run(["strace", "-e", f"trace={kind}", "true"], capture_output=True, text=True)
        if done.returncode == 0 and "invalid" not in done.stderr:
            kinds.append(kind)
    return kinds


def count_calls(base, work, kinds):
    """{kind: most calls of one thread} in one undisturbed commit."""
    shutil.copytree(base, work)
    log = work + ".strace"
    out, code = traced(work, ["-e", "trace=" + ",".join(kinds), "-o", log])
    if code != 0 or "acked 2" not in out:
        raise SystemExit(f"the undisturbed commit failed: {code} {out}")
    per_thread = collections.Counter()
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = re.match(r"(\d+)\s+(\w+)\(", line)
            if found and found.group(2) in kinds:
                per_thread[(found.group(1), found.group(2))] += 1
    most = collections.Counter()
    for (_, kind), number in per_thread.items():
        most[kind] = max(most[kind], number)
    shutil.rmtree(work)
    return most


def check(work):
    done = subprocess.run([PROBE, "check", work, "3", "3"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        return {"error": done.stderr.strip()}
    return json.loads(done.stdout)


def main():
    every = 1 if "--all" in sys.argv[1:] else 4
    if shutil.which("strace") is None:
        skip("strace is not installed")
    begin = time.monotonic()
    root = tempfile.mkdtemp(prefix="heddle-kill-points-")
    try:
        base = os.path.join(root, "base")
        work = os.path.join(root, "work")
        os.makedirs(os.path.join(base, "checkpoints"))
        os.makedirs(os.path.join(base, "state"))
        probe = subprocess.Popen([PROBE, "save", base, "1", "1"], stdout=subprocess.PIPE, text=True)
        os.waitid(os.P_PID, probe.pid, os.WSTOPPED | os.WNOWAIT)
        os.kill(probe.pid, signal.SIGCONT)
        if "acked 1" not in probe.communicate(timeout=60)[0]:
            raise SystemExit("the first checkpoint was not committed")
        most = count_calls(base, work, known_kinds())
        kill_points = torn = loadable = 0
        failures = []
        for kind, number in sorted(most.items()):
            for k in range(1, number + 1, every if kind in HARMLESS else 1):
                shutil.copytree(base, work)
                out, code = traced(work, ["-e", f"trace={kind}", "-o", "/dev/null",
                                          "-e", f"inject={kind}:signal=SIGKILL:when={k}"])
                kill_points += code == -signal.SIGKILL
                found = check(work)
                torn += found.get("torn", 1)
                good = found.get("loadable", 0) >= 1 and found.get("torn") == 0
                if "acked 2" in out and found.get("newest") != 2:
                    good = False  # acknowledged, then lost
                loadable += good and code == -signal.SIGKILL
                if not good:
                    failures.append({"kind": kind, "k": k, "acked": "acked 2" in out, **found})
                shutil.rmtree(work)
        for failure in failures[:20]:
            print(json.dumps(failure))
        print(json.dumps({"kill_points": kill_points, "torn": torn, "loadable": loadable,
                          "calls": dict(sorted(most.items())), "seconds": round(time.monotonic() - begin, 1)}))
        return 0 if kill_points > 0 and torn == 0 and loadable == kill_points and not failures else 1
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
