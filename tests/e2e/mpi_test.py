#!/usr/bin/env python3
"""A job over OpenMPI through real daemons: ranks that our shims start, without mpirun.

Proves: two workers, a sharded job, `parallel.backend=mpi` gives the series of (step, loss, batch_hash) that Gloo gives,
bit for bit, on one host and between two; a worker daemon's kill -9 stops no rank; a rank's kill -9 is recovered from;
nothing is left behind; a cluster whose workers have no OpenMPI says so instead of starting anything.
"""

import os
import signal
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import Cluster, check, main, prepare_data, processes, wait_until, write_config
from support.faultlab.netns import Hosts, usable
from support.faultlab.network_cluster import NetworkCluster

STEPS = 300
SHARED = ("parallel.shard=full", "training.gradient_accumulation_steps=2")


def finished(cluster, job):
    body = cluster.wait_done(job, 180)
    check(body["result"] == "SUCCEEDED", f"job over {job} ended {body.get('result')}: {body.get('attempts')}")
    return body


def over_mpi(cluster, data):
    job = cluster.submit(write_config(cluster, data, name="mpi", steps=STEPS), "parallel.backend=mpi", *SHARED)
    wait_until("some steps over MPI", lambda: cluster.last_step(job) >= 20, 90)
    check(not cluster.find("heddle-mpi-server"), "a server of MPI stays after the start of the group")
    trainers = cluster.ranks()
    check(len(trainers) == 2, f"ranks: {trainers}")
    log = cluster.heddle("logs", job, "--rank", "0").stdout
    check("backend=mpi" in log or '"backend":"mpi"' in log or "backend mpi" in log, f"not over MPI: {log[:2000]}")

    os.kill(cluster.find("heddle-worker")[0], signal.SIGKILL)
    cluster.up()
    step = cluster.last_step(job)
    wait_until("steps after a worker daemon's kill", lambda: cluster.last_step(job) > step + 5, 60)
    check(cluster.ranks() == trainers, "a rank over MPI died with its daemon")

    victim = next(pid for pid, _, env in processes() if pid in trainers and env.get(b"HEDDLE_RANK") == b"1")
    os.kill(victim, signal.SIGKILL)
    wait_until("a new attempt", lambda: cluster.job(job)["restarts"] >= 1, 60)
    body = finished(cluster, job)
    check(body["attempts"][-1].get("outcome") == "SUCCEEDED", f"{body['attempts']}")
    cause = body["attempts"][0].get("cause", {})
    check(cause.get("rank", 0) == 1, f"the cause names another rank: {cause}")
    return cluster.series(job), body


def without_mpi():
    """Workers that say they have no OpenMPI: the job waits with the reason, no process starts."""
    with Cluster(workers=1) as cluster:
        cluster.env["HEDDLE_WORKER_LABELS"] = "mpi=none"
        data = prepare_data(cluster)
        cluster.up()
        job = cluster.submit(write_config(cluster, data, name="nompi", steps=5), "parallel.backend=mpi",
                             "parallel.ranks=1")
        why = wait_until("a reason", lambda: (w := cluster.json("why", job)).get("text") and w["reason"] !=
                         "NOT_YET_EVALUATED" and w, 30)
        check("OpenMPI" in why["text"], f"the reason does not name OpenMPI: {why}")
        check(not cluster.ranks(), "a rank was started")
        print(f"  {why['reason']}: {why['text']}", flush=True)
        cluster.heddle("cancel", job)


def between_hosts(expected):
    """One rank in each of two network namespaces: OpenMPI's TCP over the interface of the data address."""
    reason = usable()
    if reason:
        print(f"  NOT RUN between hosts: {reason}", flush=True)
        return
    with Hosts("c", "w1", "w2") as hosts, NetworkCluster(hosts) as cluster:
        data = prepare_data(cluster)
        cluster.up()
        job = cluster.submit(write_config(cluster, data, name="mpi", steps=STEPS), "parallel.backend=mpi", *SHARED)
        wait_until("some steps over MPI", lambda: cluster.last_step(job) >= 20, 90)
        check(cluster.rank_of("w1") and cluster.rank_of("w2"), "the ranks are not on two hosts")
        finished(cluster, job)
        series = cluster.series(job)
        check(series == expected, "other bits between hosts than on one")
        print(f"  {STEPS} steps over MPI between two hosts equal those over Gloo", flush=True)


def test(argv):
    with Cluster(workers=2) as cluster:
        data = prepare_data(cluster)
        cluster.up()
        series, body = over_mpi(cluster, data)
        plain = cluster.submit(write_config(cluster, data, name="gloo", steps=STEPS), "parallel.backend=gloo", *SHARED)
        finished(cluster, plain)
        expected = cluster.series(plain)
        check(len(series) == STEPS and series == expected,
              f"other bits than Gloo at {[s for s in expected if series.get(s) != expected[s]][:5]}")
        print(f"  {STEPS} steps over MPI equal those over Gloo; {body['restarts']} restart after a rank's kill", flush=True)
    between_hosts(expected)
    without_mpi()


main(test)
