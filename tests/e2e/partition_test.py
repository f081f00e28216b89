#!/usr/bin/env python3
"""A worker partitioned in its own network namespace.

Three hosts (coordinator, two workers) with mutual TLS between them. The worker that runs the job is cut off: the job
goes on on the other worker from its newest committed checkpoint, and after healing the old attempt's late commit is
refused (fence) and its rank is killed. Both are shown in the events. Prints one JSON line of figures.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import check, main, prepare_data, skip, wait_until, write_config
from support.faultlab.netns import Hosts, usable
from support.faultlab.network_cluster import NetworkCluster


def test(argv):
    reason = usable()
    if reason:
        skip(reason)
    with Hosts("c", "w1", "w2") as hosts, NetworkCluster(hosts) as c:
        data = prepare_data(c)
        c.up()
        job = c.submit(write_config(c, data, name="cut", steps=200_000, ranks=1, save=400))
        # Cut right after a commit: the next save comes due behind the partition, so that its request is what arrives
        # late. A save caught in the middle of its writing would wait for its permit and ask for nothing.
        wait_until("a first commit", lambda: [k for k in c.json("ckpt", "ls", job)["checkpoints"]
                                              if k["state"] == "COMMITTED"], 60)
        cut = next(name for name in ("w1", "w2") if c.rank_of(name))
        other = "w2" if cut == "w1" else "w1"
        old = c.job(job)["attempts"][-1]
        hosts.cut(cut)
        start = time.monotonic()
        wait_until("the job to step on the other worker", lambda: len(c.job(job)["attempts"]) == 2 and c.rank_of(other)
                   and c.job(job)["attempts"][-1]["state"] == "RUNNING", 60, 0.2)
        moved = time.monotonic() - start
        survivors = c.rank_of(cut)
        newer = wait_until("a commit of the new attempt", lambda: [
            k for k in c.json("ckpt", "ls", job)["checkpoints"] if k["state"] == "COMMITTED"
            and k["fence"] == c.job(job)["attempts"][-1]["fence"]], 60, 0.2)
        hosts.heal(cut)
        healed = time.monotonic()
        wait_until("the old rank to be killed", lambda: not c.rank_of(cut), 60, 0.1)
        killed = time.monotonic() - healed
        codes = [e["code"] for e in c.events(job)]
        refused = [e for e in c.events(job) if e["code"] == "CHECKPOINT_FENCED"]
        check(refused, f"no refused commit of the old attempt in the events: {codes}")
        stale = [k for k in c.json("ckpt", "ls", job)["checkpoints"] if k["fence"] == old["fence"]
                 and k["state"] == "COMMITTED" and k["created_at"] > newer[0]["created_at"]]
        check(not stale, f"a stale attempt committed: {stale}")
        check("ATTEMPT_FENCED" in codes, f"no fencing in the events: {codes}")
        c.heddle("cancel", job)
        body = c.wait_done(job, 60)
        check(body["result"] == "CANCELLED", f"{body['state']} {body.get('result')}")
        for event in c.events(job):
            if event["code"] in ("WORKER_SUSPECT", "WORKER_LOST", "ATTEMPT_FENCED", "ATTEMPT_PLACED",
                                 "CHECKPOINT_FENCED", "ATTEMPT_ENDED"):
                print(f"  {event['seq']} {event['code']} {event['target']}: {event['text']}", flush=True)
        print(json.dumps({"test": "partition", "attempts": len(body["attempts"]), "old_rank_alive_while_cut":
                          len(survivors), "seconds_to_new_attempt": round(moved, 1), "stale_commits_refused":
                          len(refused), "stale_commits_accepted": len(stale),
                          "seconds_from_heal_to_old_rank_killed": round(killed, 2)}))


main(test)
