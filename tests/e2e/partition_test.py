#!/usr/bin/env python3
"""A worker partitioned in its own network namespace.

Three hosts (coordinator, two workers) with mutual TLS between them. The worker that runs the job is cut off: the job
goes on on the other worker from its newest committed checkpoint, and after healing the old attempt's late commit is
refused (fence) and its rank is killed. Both are shown in the events. Prints one JSON line of figures.
"""

import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import BIN, Cluster, check, main, prepare_data, processes, skip, wait_until, write_config
from support.faultlab.netns import Hosts, make_certificates, usable


class NetworkCluster(Cluster):
    """As Cluster, but each daemon stands in its own network namespace; the CLI uses the unix socket."""

    def __init__(self, hosts):
        super().__init__(workers=2)
        self.hosts = hosts
        self.daemons = {}
        self.socket = f"unix:{self.state}/coordinator.sock"
        self.env["HEDDLE_COORDINATOR"] = self.socket
        ca, cert, key = make_certificates(os.path.join(self.dir, "tls"), hosts.address.values())
        self.tls = ["--tls-ca", ca, "--tls-cert", cert, "--tls-key", key]

    def start(self, name, argv):
        log = open(os.path.join(self.dir, f"{name}.log"), "ab")
        self.daemons[name] = subprocess.Popen(self.hosts.command(name, argv), stdout=log, stderr=log, env=self.env,
                                              stdin=subprocess.DEVNULL, start_new_session=True)

    def up(self):
        os.makedirs(self.state, mode=0o700, exist_ok=True)
        address = f"{self.hosts.address['c']}:7407"
        self.start("c", [os.path.join(BIN, "heddle-coordinator"), "--state", self.state, "--listen", self.socket,
                         "--listen", address, *self.tls])
        wait_until("coordinator", lambda: self.heddle("status", ok=False).returncode == 0, 20)
        for name in ("w1", "w2"):
            self.start(name, [os.path.join(BIN, "heddle-worker"), "--coordinator", address, "--state",
                              os.path.join(self.dir, name), "--cpus", "1", "--data-address",
                              self.hosts.address[name], *self.tls])
        wait_until("two workers", lambda: self.json("status")["nodes"]["connected"] == 2, 20)
        return self

    def down(self):
        self.kill_all()

    def rank_of(self, name):
        """Pids of ranks behind this host's worker."""
        mark = os.path.join(self.dir, name) + "/"
        return [p for p, argv, env in processes() if os.path.basename(argv[0]) == "heddle-trainer" and
                any(mark in w for w in argv + [v.decode(errors="replace") for v in env.values()])]


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
