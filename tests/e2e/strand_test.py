#!/usr/bin/env python3
"""The life of one job, submit to status, through every part, as README's table tells it (architecture section 5).

Two workers, two ranks, real text. Checks each part by what it leaves: id, events in order, checkpoints, metrics,
logs, export, logits, generation, resume of a finished job, same request id = same job.
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import Cluster, check, main, prepare_data, write_config


def ordered(codes, *wanted):
    """`wanted` stands in `codes` in this order (others may lie between)."""
    at = 0
    for code in codes:
        if at < len(wanted) and code == wanted[at]:
            at += 1
    check(at == len(wanted), f"event {wanted[at] if at < len(wanted) else ''} is missing or out of order in {codes}")


def the_job(c, data):
    path = write_config(c, data, name="strand", steps=60, save=20)
    job = c.submit(path)
    body = c.wait_done(job, 120)
    check(body["state"] == "DONE" and body["result"] == "SUCCEEDED", f"ended {body}")
    check(body["step"] == 60 and body["max_steps"] == 60 and body["ranks"] == 2, f"{body}")
    check(body["attempts"][0]["outcome"] == "SUCCEEDED" and len(body["attempts"][0]["workers"]) == 2, f"{body['attempts']}")
    codes = [e["code"] for e in c.events(job)]
    ordered(codes, "JOB_SUBMITTED", "ATTEMPT_PLACED", "ATTEMPT_RUNNING", "CHECKPOINT_COMMITTED", "ATTEMPT_ENDED",
            "JOB_DONE")
    lines = c.json_lines("metrics", job)
    check([p["step"] for p in lines] == list(range(1, 61)), "metrics are not one point a step")
    check(all(isinstance(p["batch_hash"], str) for p in lines), "batch_hash must be a string")
    check(lines[0]["loss"] > lines[-1]["loss"] + 0.5, "the loss does not fall")
    return job, path


def checkpoints(c, job):
    listed = c.json("ckpt", "ls", job)["checkpoints"]
    steps = sorted(k["step"] for k in listed if k["state"] == "COMMITTED")
    # A save that is due while one is in flight starts at the first free step after it.
    check(len(steps) >= 2 and steps[0] >= 20 and steps[-1] == 60, f"committed steps {steps}")
    check(all(isinstance(k["fence"], str) and k["ranks"] == 2 and k["bytes"] > 0 for k in listed), f"{listed}")
    shown = c.json("ckpt", "show", f"{job}@{steps[0]}")
    check(shown["checkpoint"]["step"] == steps[0], f"{shown}")
    c.heddle("ckpt", "verify", f"{job}@latest")
    out = os.path.join(c.dir, "export")
    c.heddle("ckpt", "export", f"{job}@latest", out)
    names = sorted(os.listdir(out))
    check("config.json" in names and "tokenizer.json" in names and any(n.endswith(".safetensors") for n in names), f"{names}")
    return out


def model_commands(c, job, folder):
    shown = c.json("model", "show", folder)
    check("parameters" in json.dumps(shown), f"{shown}")
    ids = c.json("generate", folder, "--ids", "1,2,3", "--max-new-tokens", "8")["ids"]
    again = c.json("generate", f"{job}@latest", "--ids", "1,2,3", "--max-new-tokens", "8")["ids"]
    check(len(ids) == 8 and ids == again, f"greedy generation differs between export and checkpoint: {ids} {again}")
    text = c.json("generate", folder, "--prompt", "def f(", "--max-new-tokens", "8")["text"]
    check(isinstance(text, str) and text, "no text")


def resume_finished(c, job):
    c.heddle("resume", job, "training.max_steps=80")
    body = c.wait_done(job, 120)
    check(body["result"] == "SUCCEEDED" and body["step"] == 80, f"resume of a finished job: {body}")
    check(len(body["attempts"]) == 2, f"{body['attempts']}")
    done = c.heddle("resume", job, "model.d_model=32", ok=False)
    check(done.returncode != 0 and "--resume-from" in done.stderr, f"a resume that changes the run: {done.stderr}")


def same_request_same_job(c, path):
    ids = {c.json("submit", path, "--hold", "--request-id", "strand-1")["id"] for _ in range(3)}
    check(len(ids) == 1, f"one request id gave {ids}")
    done = c.heddle("submit", path, "training.seed=8", "--hold", "--request-id", "strand-1", ok=False)
    check(done.returncode == 6, f"same request id, other body: exit {done.returncode}")
    job = ids.pop()
    check(c.job(job)["state"] == "HELD", "not held")
    c.heddle("cancel", job)
    check(c.wait_done(job, 20)["result"] == "CANCELLED", "cancel of a held job")


def cancel_and_pause(c, path):
    job = c.submit(path, "training.max_steps=100000")
    c.heddle("wait", job, "--for", "running", "--timeout", "60s")
    c.heddle("pause", job)
    c.heddle("wait", job, "--timeout", "1s", ok=False)
    body = c.job(job)
    for _ in range(100):
        body = c.job(job)
        if body["state"] == "PAUSED":
            break
        c.heddle("wait", job, "--timeout", "1s", ok=False)
    check(body["state"] == "PAUSED" and not c.ranks(), f"pause: {body['state']}")
    paused_at = max(k["step"] for k in c.json("ckpt", "ls", job)["checkpoints"])
    c.heddle("resume", job)
    c.heddle("wait", job, "--for", "running", "--timeout", "60s")
    c.heddle("cancel", job)
    body = c.wait_done(job, 60)
    check(body["result"] == "CANCELLED", f"{body}")
    series = c.series(job)
    check(sorted(series) == list(range(1, max(series) + 1)) and max(series) >= paused_at, "a gap in the series")


def reading_commands(c, job):
    check(any(j["id"] == job for j in c.json("ps", "-a")["jobs"]), "ps -a lacks the job")
    status = c.json("status")
    check(status["nodes"]["connected"] == 2 and status["cluster_id"], f"{status}")
    nodes = c.json("node", "ls")["nodes"]
    check(len(nodes) == 2 and all(n["state"] == "CONNECTED" for n in nodes), f"{nodes}")
    check("step" in c.heddle("logs", job, "--rank", "0").stdout.lower(), "rank 0 logged no step")
    check(c.json("why", job)["text"], "why says nothing")


def test(argv):
    with Cluster(workers=2) as c:
        data = prepare_data(c)
        c.up()
        job, path = the_job(c, data)
        folder = checkpoints(c, job)
        model_commands(c, job, folder)
        reading_commands(c, job)
        resume_finished(c, job)
        same_request_same_job(c, path)
        cancel_and_pause(c, path)
        c.up()  # idempotent: re-attaches, starts nothing twice
        check(len(c.find("heddle-worker")) == 2 and len(c.find("heddle-coordinator")) == 1, f"{c.all_processes()}")
        print(json.dumps({"test": "strand", "job": job, "passed": True}))


main(test)
