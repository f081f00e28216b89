#!/usr/bin/env python3
"""training.nan_policy: rollback, through coordinator, workers and trainers.

1. One rank's weights are damaged in its memory while it trains, as a bad memory module would: all ranks leave
   together, the job goes back to its checkpoint, leaves the data out, and comes where an undamaged run comes.
2. A run that can only diverge goes back three times, then ends FAILED with the cause.
Prints one JSON line of figures.
"""

import json
import os
import signal
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import Cluster, check, main, prepare_data, wait_until, write_config

STEPS = 100_000  # longer than any run here: how far one comes depends on the machine
SAVE = 200
MORE = 150       # steps after the rollback
WIDTH = 64  # d_model of the test's configuration: the length of a norm's gains

# Floats from 0.5 to 2 have this last byte; gains of norms start at 1 and stay near it, other weights are far smaller.
GAINS = b"\x3f" * WIDTH
NAN = struct.pack("<f", float("nan"))


def find_gains(pid):
    """Places in the process's own memory of what looks like gains."""
    hits = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            words = line.split()
            begin, end = (int(x, 16) for x in words[0].split("-"))
            if not words[1].startswith("rw") or (len(words) > 5 and words[5] != "[heap]"):
                continue
            try:
                memory.seek(begin)
                data = memory.read(end - begin)
            except OSError:
                continue
            last_bytes = data[3::4]
            at = last_bytes.find(GAINS)
            while at >= 0:
                hits.append(begin + 4 * at)
                at = last_bytes.find(GAINS, at + WIDTH)
    return hits


def damage(pid, places):
    os.kill(pid, signal.SIGSTOP)
    try:
        with open(f"/proc/{pid}/mem", "r+b", 0) as memory:
            for at in places:
                memory.seek(at)
                memory.write(NAN)
    finally:
        os.kill(pid, signal.SIGCONT)


def by_batch(cluster, job):
    """batch_hash -> loss; of a batch read twice the last."""
    return {p["batch_hash"]: p["loss"] for p in cluster.json_lines("metrics", job)}


def stop_at(cluster, job, step):
    wait_until(f"step {step} of {job}", lambda: cluster.last_step(job) >= step, 400, 0.2)
    cluster.heddle("cancel", job)
    return cluster.wait_done(job, 60)


def damaged_rank(cluster, data):
    config = write_config(cluster, data, name="damaged", steps=STEPS, save=SAVE)
    job = cluster.submit(config, "training.nan_policy=rollback")

    def saved():
        done = [c["step"] for c in cluster.json("ckpt", "ls", job)["checkpoints"] if c["state"] == "COMMITTED"]
        return max(done, default=0)
    wait_until("the first steps", lambda: cluster.last_step(job) >= 3, 120)
    victim = cluster.ranks()[-1]
    # Before the first save: later the copy of a save looks alike, and is not what is to be hit.
    places = find_gains(victim)
    check(places, "no gains were found in the rank's memory")
    check(cluster.last_step(job) < SAVE, "the run was too fast for this test")
    checkpoint = wait_until("the first checkpoint", saved, 240, 0.02)
    damage(victim, places)
    wait_until("the second attempt", lambda: cluster.json_lines("metrics", job)[-1]["attempt"] == 2, 120, 0.2)
    attempts = cluster.job(job)["attempts"]
    left = attempts[0]["last_step"]
    body = stop_at(cluster, job, left + MORE)
    attempts = body["attempts"]
    check(len(attempts) == 2, f"attempts: {attempts}")
    cause = attempts[0]["cause"]
    check((cause["code"], cause["category"]) == ("ROLLED_BACK", "ROLLBACK"), f"cause: {cause}")
    for word in ("not finite", "first in model.", "sequences ", "back to step "):
        check(word in cause["detail"], f"the report lacks '{word}': {cause['detail']}")
    check(any("restarts used 0" in e["text"] for e in cluster.events(job) if e["code"] == "JOB_BACKOFF"),
          "a rollback burnt the budget of restarts")
    start = attempts[1]["start_step"]
    check(checkpoint <= start <= left - 3, f"started from {start}, saved {checkpoint}, left at {left}")
    check(any(e["code"] == "JOB_ROLLED_BACK" for e in cluster.events(job)), "no event tells of the rollback")
    again = min(p["step"] for p in cluster.json_lines("metrics", job) if p["attempt"] == 2)
    check(again == start + 1, "the steps after the checkpoint do not appear again")
    cluster.heddle("ckpt", "verify", f"{job}@latest", timeout=120)
    return job, left - start


def compare(cluster, data, job):
    """Loss of the run against an undamaged one, over the last batches that both have read."""
    clean = cluster.submit(write_config(cluster, data, name="clean", steps=STEPS, save=SAVE))
    stop_at(cluster, clean, cluster.last_step(job) + 3)
    ours, theirs = by_batch(cluster, job), by_batch(cluster, clean)
    common = [b for b in theirs if b in ours]
    missing = list(theirs)[:list(theirs).index(common[-1])]
    missing = [b for b in missing if b not in ours]
    # The three that were left out; those of the first attempt still stand in its series.
    check(len(missing) <= 3, f"{len(missing)} batches were never read")
    common = common[-50:]
    a, b = (sum(run[x] for x in common) / len(common) for run in (ours, theirs))
    check(abs(a / b - 1) < 0.01, f"loss {a} after the rollback, {b} without")
    return a / b - 1


def diverges(cluster, data):
    config = write_config(cluster, data, name="diverges", steps=STEPS, save=1)
    job = cluster.submit(config, "training.nan_policy=rollback", "training.learning_rate=100",
                         "training.weight_decay=100", "training.warmup_steps=0")
    body = cluster.wait_done(job, 240)
    check((body["state"], body["result"]) == ("DONE", "FAILED"), f"it ended {body['state']} {body['result']}")
    check(body["reason"].startswith("NO_ROLLBACKS: more than 3 rollbacks"), f"reason: {body['reason']}")
    check(len(body["attempts"]) == 4, f"{len(body['attempts'])} attempts")
    for checkpoint in cluster.json("ckpt", "ls", job)["checkpoints"]:
        if checkpoint["state"] == "COMMITTED":
            cluster.heddle("ckpt", "verify", checkpoint["id"], timeout=60)


def test(_):
    with Cluster(workers=2) as cluster:
        data = prepare_data(cluster)
        cluster.up()
        job, repeated = damaged_rank(cluster, data)
        difference = compare(cluster, data, job)
        diverges(cluster, data)
        print(json.dumps({"test": "rollback", "steps_repeated": repeated, "loss_difference": round(difference, 6)}))


main(test)
