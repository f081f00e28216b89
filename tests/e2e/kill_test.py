#!/usr/bin/env python3
"""kill -9 of a random rank, shim, worker daemon or coordinator, of a whole host and of everything, during one job.

A host is a daemon, its shims and their ranks, killed at once; "away" kills the ranks while their daemon is down, so
that it finds them ended when it comes back. Proves (reliability T7-T9): the series of (step, loss, batch_hash) is
bit-equal to that of an undisturbed run, a killed daemon stops no trainer, and every kill is recovered from. Prints one
JSON line of figures.
usage: kill_test.py [--kills N] [--seed S]
"""

import json
import os
import random
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import (Cluster, check, main, median, prepare_data, processes, seed_from, wait_until,
                                      write_config)


STEPS = 200_000
KINDS = ("rank", "worker", "coordinator", "host", "away", "shim", "everything")


def option(argv, name, default):
    return int(argv[argv.index(name) + 1]) if name in argv else default


def progress(cluster, job):
    """(step, restarts) as the coordinator knows them; None while it is away."""
    done = cluster.heddle("describe", job, "-o", "json", ok=False)
    if done.returncode != 0:
        return None
    body = json.loads(done.stdout)
    return body.get("step", 0), body.get("restarts", 0), body["state"]


def alive(pids):
    running = {pid for pid, _, _ in processes()}
    return all(p in running for p in pids)


def ended(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    wait_until(f"the end of {pids}", lambda: not any(alive([p]) for p in pids), 10, 0.01)


def victims_of(cluster, kind, rng):
    """Groups of pids, killed one after the other."""
    if kind in ("rank", "shim"):
        pids = cluster.find({"rank": "heddle-trainer", "shim": "heddle-shim"}[kind])
        return [[rng.choice(pids)]] if pids else []
    if kind == "everything":
        return [[p for pids in cluster.all_processes().values() for p in pids]]
    state = f"{cluster.state}/worker-{rng.randint(1, cluster.workers)}"
    daemon, shims, ranks = ([p for p in cluster.find(f"heddle-{name}") if belongs(p, state)]
                            for name in ("worker", "shim", "trainer"))
    return [daemon, ranks] if kind == "away" else [daemon + shims + ranks]


def belongs(pid, folder):
    """Whether a process of the cluster has this folder in its arguments or environment."""
    return any(p == pid and any(f"{folder}/" in f"{word}/" for word in argv + [v.decode(errors="replace") for v in
                                                                              env.values()])
               for p, argv, env in processes())


def kill_work(cluster, job, kind, rng):
    """Kills ranks, with or without what is around them; returns ms to the first step of the new attempt."""
    groups = victims_of(cluster, kind, rng)
    if not any(groups):
        return None
    before = cluster.json_lines("metrics", job)
    attempt = before[-1]["attempt"] if before else 0
    start = time.monotonic()
    for pids in groups:
        ended(pids)
    if kind not in ("rank", "shim"):
        cluster.up()
        wait_until("coordinator answers", lambda: progress(cluster, job), 30)

    def stepped():
        if progress(cluster, job)[2] == "DONE":
            return True
        points = cluster.json_lines("metrics", job)
        return bool(points) and points[-1]["attempt"] > attempt
    wait_until("first step of the new attempt", stepped, 60, 0.02)
    return (time.monotonic() - start) * 1000


def kill_daemon(cluster, job, program, rng):
    """Kills a daemon; returns (ms until it serves again and steps go on, trainers lost)."""
    trainers = cluster.ranks()
    start = time.monotonic()
    os.kill(rng.choice(cluster.find(program)), signal.SIGKILL)
    cluster.up()
    now = wait_until("coordinator answers", lambda: progress(cluster, job), 30)
    if now[2] != "DONE":
        base = now[0]

        def goes_on():
            state = progress(cluster, job)
            return state and (state[2] == "DONE" or state[0] > base)
        wait_until(f"steps go on after kill -9 of {program}", goes_on, 60, 0.05)
    took = (time.monotonic() - start) * 1000
    lost = 0
    state = progress(cluster, job)
    if state and state[2] != "DONE" and not alive(trainers):
        lost = sum(1 for p in trainers if not alive([p]))
    return took, lost


def storm(cluster, job, kills, rng):
    """Kills `kills` times; returns what was seen: recovery times, trainers lost, the series after each kill."""
    victims = {kind: [] for kind in KINDS}
    trainers_lost, seen = 0, []
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    rng.shuffle(kinds)
    for number, kind in enumerate(kinds):
        time.sleep(rng.uniform(0.1, 1.2))
        state = progress(cluster, job)
        check(state is not None, "coordinator does not answer between kills")
        if state[2] == "DONE":
            body = cluster.job(job)
            check(False, f"job ended after {number} kills: {body.get('code')} {body.get('reason')} "
                         f"{[a.get('cause') for a in body['attempts']]}")
        if kind in ("worker", "coordinator"):
            took, lost = kill_daemon(cluster, job, f"heddle-{kind}", rng)
            trainers_lost += lost
        else:
            took = kill_work(cluster, job, kind, rng)
        if took is not None:
            victims[kind].append(took)
        seen.append((kind, cluster.series(job)))
        print(f"kill {number + 1}/{kills}: {kind} recovered in {took and round(took)} ms", flush=True)
    return victims, trainers_lost, seen


def run_until(cluster, job, step, timeout):
    """Waits for a step, then cancels the job; returns its series."""
    wait_until(f"step {step} of {job}", lambda: cluster.last_step(job) >= step, timeout, 0.2)
    cluster.heddle("cancel", job)
    body = cluster.wait_done(job, 60)
    check(body["state"] == "DONE" and body["result"] == "CANCELLED", f"cancelled job ended {body}")
    return cluster.series(job), body


def test(argv):
    kills = option(argv, "--kills", 30)
    rng = random.Random(seed_from(argv))
    with Cluster(workers=2) as cluster:
        data = prepare_data(cluster)
        cluster.up()
        # Longer than any storm: how far the job comes depends on the machine, what it computes must not.
        stormy = cluster.submit(write_config(cluster, data, name="stormy", steps=STEPS))
        wait_until("first step", lambda: cluster.series(stormy), 60)
        victims, trainers_lost, seen = storm(cluster, stormy, kills, rng)
        series, body = run_until(cluster, stormy, cluster.last_step(stormy) + 50, 120)
        seen.append(("end", series))

        calm = cluster.submit(write_config(cluster, data, name="calm", steps=STEPS))
        expected, undisturbed = run_until(cluster, calm, max(series), 1200)
        check(undisturbed["restarts"] == 0, f"the undisturbed run restarted: {undisturbed}")
        for number, (kind, points) in enumerate(seen):
            wrong = [s for s, v in points.items() if expected.get(s) != v]
            check(not wrong, f"after kill {number + 1} ({kind}) step {wrong[:3]} differs from the undisturbed run")
        check(len(series) == max(series), f"steps are missing: {len(series)} of {max(series)}")
        check(trainers_lost == 0, f"{trainers_lost} trainers died with a daemon")
        print(json.dumps({"test": "kill", "kills": sum(map(len, victims.values())), "bit_exact": [len(seen) - 1, kills],
                          "steps": max(series), "restarts": body["restarts"],
                          "trainers_lost_to_daemon_kills": trainers_lost,
                          "recovery_ms_p50": {k: round(median(v)) for k, v in victims.items() if v},
                          "recovery_ms_max": {k: round(max(v)) for k, v in victims.items() if v}}))


main(test)
