#!/usr/bin/env python3
"""kill -9 of a random rank, worker daemon or coordinator, again and again during one job.

Proves (reliability T7-T9): the series of (step, loss, batch_hash) is bit-equal to that of an undisturbed run,
a killed daemon stops no trainer, and every kill is recovered from. Prints one JSON line of figures.
usage: kill_test.py [--kills N] [--seed S] [--steps N]
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


def kill_rank(cluster, job, rng):
    """Kills one trainer; returns ms from the kill to the first step of the new attempt."""
    pids = cluster.ranks()
    if not pids:
        return None
    before = cluster.json_lines("metrics", job)
    attempt = before[-1]["attempt"] if before else 0
    start = time.monotonic()
    os.kill(rng.choice(pids), signal.SIGKILL)

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


def test(argv):
    kills, steps = option(argv, "--kills", 30), option(argv, "--steps", 3000)
    rng = random.Random(seed_from(argv))
    with Cluster(workers=2) as cluster:
        data = prepare_data(cluster)
        cluster.up()
        calm = cluster.submit(write_config(cluster, data, name="calm", steps=steps))
        body = cluster.wait_done(calm, 300)
        check(body["state"] == "DONE" and body["result"] == "SUCCEEDED", f"undisturbed run ended {body}")
        expected = cluster.series(calm)
        check(len(expected) == steps, f"undisturbed run has {len(expected)} of {steps} steps")

        stormy = cluster.submit(write_config(cluster, data, name="stormy", steps=steps))
        wait_until("first step", lambda: cluster.series(stormy), 60)
        victims = {"rank": [], "worker": [], "coordinator": []}
        trainers_lost, equal_checks = 0, 0
        kinds = [("rank", "worker", "coordinator")[i % 3] for i in range(kills)]
        rng.shuffle(kinds)
        for number, kind in enumerate(kinds):
            time.sleep(rng.uniform(0.1, 1.2))
            state = progress(cluster, stormy)
            check(state is not None, "coordinator does not answer between kills")
            check(state[2] != "DONE", f"job ended after {number} kills: raise --steps")
            if kind == "rank":
                took = kill_rank(cluster, stormy, rng)
            else:
                took, lost = kill_daemon(cluster, stormy, f"heddle-{kind}", rng)
                trainers_lost += lost
            if took is not None:
                victims[kind].append(took)
            seen = cluster.series(stormy)
            wrong = [s for s, v in seen.items() if expected[s] != v]
            check(not wrong, f"after kill {number + 1} ({kind}) step {wrong[:3]} differs from the undisturbed run")
            equal_checks += 1
            print(f"kill {number + 1}/{kills}: {kind} recovered in {took and round(took)} ms", flush=True)
        body = cluster.wait_done(stormy, 600)
        check(body["state"] == "DONE" and body["result"] == "SUCCEEDED", f"disturbed run ended {body}")
        series = cluster.series(stormy)
        check(series == expected, f"{sum(series.get(s) != v for s, v in expected.items())} steps differ")
        check(trainers_lost == 0, f"{trainers_lost} trainers died with a daemon")
        print(json.dumps({"test": "kill", "kills": sum(map(len, victims.values())), "bit_exact": [equal_checks, kills],
                          "steps": steps, "restarts": body["restarts"], "trainers_lost_to_daemon_kills": trainers_lost,
                          "recovery_ms_p50": {k: round(median(v)) for k, v in victims.items() if v},
                          "recovery_ms_max": {k: round(max(v)) for k, v in victims.items() if v}}))


main(test)
