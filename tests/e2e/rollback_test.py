#!/usr/bin/env python3
"""training.nan_policy: rollback, through coordinator, workers and trainers.

1. One rank's weights are damaged in its memory while it trains, as a bad memory module would: all ranks leave
   together, the job goes back to its checkpoint, leaves the data out, and comes where an undamaged run comes.
2. A run that can only diverge goes back three times, then ends FAILED with the cause.
Prints one JSON line of figures.
"""

import json
import os
import re
import signal
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import Cluster, check, main, prepare_data, wait_until, write_config

STEPS = 4000
SAVE = 1000
WIDTH = 64  # d_model of the test's configuration: the length of a norm's gains

# Floats from 0.5 to 2 have this last byte; gains of norms start at 1 and stay near it, other weights are far smaller.
GAINS = re.compile(b"(?:[\x00-\xff]{3}\x3f){%d,}" % WIDTH)
NAN = struct.pack("<f", float("nan"))


def damage_gains(pid):
    """Writes a NaN into every array in the process's own memory that looks like gains; returns their number."""
    hits = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            words = line.split()
            begin, end = (int(x, 16) for x in words[0].split("-"))
            own = words[1].startswith("rw") and (len(words) < 6 or words[5] == "[heap]")
            if not own:
                continue
            try:
                memory.seek(begin)
                data = memory.read(end - begin)
            except OSError:
                continue
            hits += [begin + m.start() for m in GAINS.finditer(data) if m.start() % 4 == 0]
    os.kill(pid, signal.SIGSTOP)
    try:
        with open(f"/proc/{pid}/mem", "r+b", 0) as memory:
            for at in hits:
                memory.seek(at)
                memory.write(NAN)
    finally:
        os.kill(pid, signal.SIGCONT)
    return len(hits)


def by_batch(cluster, job):
    """batch_hash -> loss; of a batch read twice the last."""
    return {p["batch_hash"]: p["loss"] for p in cluster.json_lines("metrics", job)}


def damaged_rank(cluster, data):
    config = write_config(cluster, data, name="damaged", steps=STEPS, save=SAVE)
    job = cluster.submit(config, "training.nan_policy=rollback")

    def committed():
        return [c for c in cluster.json("ckpt", "ls", job)["checkpoints"] if c["state"] == "COMMITTED"]
    wait_until("the first checkpoint", committed, 120, 0.02)
    saved = max(c["step"] for c in committed())
    check(cluster.last_step(job) < saved + SAVE // 2, "the run was too fast for this test")
    hits = damage_gains(cluster.ranks()[-1])
    check(hits > 0, "no gains were found in the rank's memory")
    body = cluster.wait_done(job, 240)
    check((body["state"], body["result"]) == ("DONE", "SUCCEEDED"), f"the job ended {body}")
    attempts = body["attempts"]
    check(len(attempts) == 2, f"attempts: {attempts}")
    cause = attempts[0]["cause"]
    check((cause["code"], cause["category"]) == ("ROLLED_BACK", "ROLLBACK"), f"cause: {cause}")
    for word in ("not finite", "first in model.", "sequences ", "back to step "):
        check(word in cause["detail"], f"the report lacks '{word}': {cause['detail']}")
    check(body.get("restarts", 0) == 0, "a rollback burnt the budget of restarts")
    check(attempts[1]["start_step"] >= saved, f"started from {attempts[1]['start_step']}, saved {saved}")
    check(any(e["code"] == "JOB_ROLLED_BACK" for e in cluster.events(job)), "no event tells of the rollback")
    points = cluster.json_lines("metrics", job)
    steps = [(p["attempt"], p["step"]) for p in points]
    first_again = min(s for a, s in steps if a == 2)
    check(first_again == attempts[1]["start_step"] + 1, "the steps after the checkpoint do not appear again")
    check(cluster.series(job).keys() == set(range(1, STEPS + 1)), "steps are missing")
    cluster.heddle("ckpt", "verify", f"{job}@latest", timeout=120)
    return job, attempts[0]["last_step"] - attempts[1]["start_step"]


def compare(cluster, data, job):
    """Loss of the run against an undamaged one, over the last batches that both have read."""
    clean = cluster.submit(write_config(cluster, data, name="clean", steps=STEPS, save=SAVE))
    body = cluster.wait_done(clean, 240)
    check(body["result"] == "SUCCEEDED", f"the clean run ended {body}")
    ours, theirs = by_batch(cluster, job), by_batch(cluster, clean)
    common = [b for b in theirs if b in ours][-50:]
    missing = [b for b in theirs if b not in ours]
    check(len(common) == 50, f"only {len(common)} batches in common")
    check(0 <= len(missing) <= 3, f"{len(missing)} batches were never read")
    a, b = (sum(run[x] for x in common) / len(common) for run in (ours, theirs))
    check(abs(a / b - 1) < 0.01, f"loss {a} after the rollback, {b} without")
    return a / b - 1


def diverges(cluster, data):
    config = write_config(cluster, data, name="diverges", steps=STEPS, save=1)
    job = cluster.submit(config, "training.nan_policy=rollback", "training.learning_rate=100",
                         "training.weight_decay=100", "training.warmup_steps=0")
    body = cluster.wait_done(job, 240)
    check((body["state"], body["result"], body["reason"]) == ("DONE", "FAILED", "NO_ROLLBACKS"), f"it ended {body}")
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
