#!/usr/bin/env python3
"""Bad input and faults from the first day: each gives a clear error or a recovery, and leaves nothing behind.

One function per fault; each prints what the user saw. usage: faults_test.py [NAME...]
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import (BIN, Cluster, check, main, prepare_data, wait_until, write_config)


def refused(done, code, *words):
    """The command failed with `code` and its message holds every word."""
    text = done.stderr
    check(done.returncode == code, f"exit {done.returncode}, expected {code}: {text or done.stdout}")
    check(text.startswith("heddle: "), f"message does not start with 'heddle: ': {text}")
    for word in words:
        check(word in text, f"message lacks {word!r}: {text}")
    print(f"  {text.strip().splitlines()[0][:150]}", flush=True)


def unknown_key_with_nearest_name(c, data):
    path = write_config(c, data, name="bad1", extra="trainng: {max_steps: 3}\n")
    refused(c.heddle("submit", path, ok=False), 2, "bad1.yaml:", "trainng", "training")


def wrong_type_and_range_both_listed(c, data):
    path = write_config(c, data, name="bad2")
    text = open(path).read().replace("micro_batch_size: 4", "micro_batch_size: four").replace(
        "learning_rate: 0.003", "learning_rate: -1")
    open(path, "w").write(text)
    refused(c.heddle("submit", path, ok=False), 2, "training.micro_batch_size", "training.learning_rate", ":16:")


def override_unknown(c, data):
    path = write_config(c, data, name="bad3")
    refused(c.heddle("submit", path, "training.max_step=3", ok=False), 2, "training.max_step", "training.max_steps")


def unsupported_option_is_refused(c, data):
    path = write_config(c, data, name="bad4")
    refused(c.heddle("submit", path, "model.dropout=0.1", ok=False), 2, "dropout")


def yaml_bomb(c, data):
    path = os.path.join(c.dir, "bomb.yaml")
    open(path, "w").write("a: " + "[" * 200000)
    start = time.monotonic()
    refused(c.heddle("submit", path, ok=False), 2, "bomb.yaml")
    check(time.monotonic() - start < 2, "a YAML bomb took more than 2 s to refuse")


def config_file_missing(c, data):
    done = c.heddle("submit", os.path.join(c.dir, "nowhere.yaml"), ok=False)
    check(done.returncode in (2, 3), f"exit {done.returncode}")
    check("nowhere.yaml" in done.stderr, done.stderr)


def unknown_job(c, data):
    refused(c.heddle("describe", "j-0000000000000", ok=False), 3, "j-0000000000000")


def failed_with(c, config, *words, overrides=(), timeout=120):
    job = c.submit(config, *overrides)
    body = c.wait_done(job, timeout)
    check(body["state"] == "DONE" and body["result"] == "FAILED", f"job ended {body['state']} {body.get('result')}")
    text = json.dumps(body)
    for word in words:
        check(word in text, f"describe lacks {word!r}: {text[:1500]}")
    check(body.get("restarts", 0) <= 3, f"{body['restarts']} restarts for a fault that cannot heal")
    print(f"  {body.get('reason')}: {body['attempts'][-1].get('cause', {}).get('detail', '')[:150]}", flush=True)
    check(not c.ranks(), f"ranks left: {c.ranks()}")


def data_set_missing(c, data):
    gone = os.path.join(c.dir, "no-such-set")
    path = write_config(c, gone, name="nodata")
    done = c.heddle("submit", path, "-o", "json", ok=False)
    if done.returncode == 0:  # accepted: then the attempt must say it
        job = json.loads(done.stdout)["id"]
        body = c.wait_done(job, 120)
        check(body["result"] == "FAILED" and "no-such-set" in json.dumps(body), f"{body}")
        print(f"  {body['attempts'][-1].get('cause')}", flush=True)
    else:
        refused(done, 2, "no-such-set")


def data_set_truncated(c, data):
    broken = os.path.join(c.dir, "truncated")
    shutil.copytree(data, broken)
    shard = next(os.path.join(broken, f) for f in sorted(os.listdir(broken)) if f.endswith(".tok"))
    os.truncate(shard, os.path.getsize(shard) - 5000)
    failed_with(c, write_config(c, broken, name="truncated"), "shard-00000.tok", "BAD_DATA")


def data_set_of_another_tokenizer(c, data):
    other = os.path.join(c.dir, "other")
    shutil.copytree(data, other)
    path = os.path.join(other, "tokenizer.json")
    text = json.load(open(path))
    text["model"]["vocab"]["zz-other"] = len(text["model"]["vocab"])
    json.dump(text, open(path, "w"))
    failed_with(c, write_config(c, other, name="othertok"), "tokenizer")


def vocabulary_larger_than_the_model(c, data):
    failed_with(c, write_config(c, data, name="smallvocab", vocabulary=300), "vocab")


def corrupt_checkpoint_block(c, data):
    """Bits flipped in the newest checkpoint: verify names it, a resume falls back to the one before."""
    path = write_config(c, data, name="rot", steps=60, save=20)
    job = c.submit(path)
    check(c.wait_done(job, 120)["result"] == "SUCCEEDED", "run failed")
    whole = c.series(job)
    listed = c.json("ckpt", "ls", job)["checkpoints"]
    good = sorted((k for k in listed if k["state"] == "COMMITTED"), key=lambda k: k["step"])
    check(len(good) >= 2, f"two committed checkpoints are needed: {listed}")
    newest, before = good[-1], good[-2]["step"]
    root = c.json("status").get("checkpoint_root") or os.path.join(c.state, "checkpoints")
    folder = os.path.join(root, newest["dir"])
    victim = next(os.path.join(folder, f) for f in sorted(os.listdir(folder)) if f.endswith(".sst"))
    os.chmod(victim, 0o600)
    with open(victim, "r+b") as f:
        f.seek(os.path.getsize(victim) // 3)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 0x40]))
    verify = c.heddle("ckpt", "verify", f"{job}@{newest['step']}", ok=False)
    check(verify.returncode == 1, f"verify of a damaged checkpoint: exit {verify.returncode}")
    check(os.path.basename(victim) in verify.stdout + verify.stderr, "verify does not name the file")
    c.heddle("resume", job, "training.max_steps=80")
    body = c.wait_done(job, 120)
    check(body["result"] == "SUCCEEDED", f"resume after damage ended {body}")
    series = c.series(job)
    # From the one before on, the longer run has another learning rate; up to there the bits are the same.
    check(max(series) == 80 and all(series[s] == whole[s] for s in range(1, before + 1)),
          "series differ after the fall-back")
    check(all(series[s][1] == whole[s][1] for s in whole), "batches differ after the fall-back")
    flagged = [k for k in c.json("ckpt", "ls", job)["checkpoints"] if k.get("damaged")]
    check(any(k["step"] == newest["step"] for k in flagged), "the damaged checkpoint is not flagged")
    print(f"  {verify.stderr.strip().splitlines()[0][:150] if verify.stderr else ''}", flush=True)


def never_fits(c, data):
    path = write_config(c, data, name="huge", ranks=2)
    job = c.submit(path, "parallel.memory_per_rank=900GiB")
    why = wait_until("a reason", lambda: (w := c.json("why", job)).get("reason") == "INFEASIBLE" and w, 20)
    check("memory" in json.dumps(why), f"why does not name memory: {why}")
    print(f"  {why['reason']}: {why['text'][:150]}", flush=True)
    c.heddle("cancel", job)
    check(c.wait_done(job, 20)["result"] == "CANCELLED", "cancel of a job that never fits")


def second_coordinator_on_the_same_state(c, data):
    state = coordinator_argv(c)
    done = subprocess.run(state, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20, env=c.env)
    check(done.returncode != 0, "a second coordinator started on the same state")
    check("in use by the coordinator with pid" in done.stdout, done.stdout)
    print(f"  {done.stdout.strip().splitlines()[-1][:150]}", flush=True)
    c.json("status")


def coordinator_argv(c):
    pid = c.find("heddle-coordinator")[0]
    return [a.decode() for a in open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")[:-1]]


def port_in_use(c, data):
    import socket
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = os.path.join(c.dir, "second-state")
        done = subprocess.run([os.path.join(BIN, "heddle-coordinator"), "--state", other, "--listen",
                               f"127.0.0.1:{port}", "--insecure-loopback"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=20, env=c.env)
    check(done.returncode != 0 and str(port) in done.stdout, f"{done.returncode}: {done.stdout}")
    print(f"  {done.stdout.strip().splitlines()[-1][:150]}", flush=True)


def killed_shim_is_a_retry(c, data):
    path = write_config(c, data, name="shim", steps=400, save=20)
    calm = c.submit(path)
    check(c.wait_done(calm, 120)["result"] == "SUCCEEDED", "calm run")
    job = c.submit(path)
    wait_until("step 30", lambda: c.last_step(job) >= 30, 60)
    os.kill(c.find("heddle-shim")[0], signal.SIGKILL)
    body = c.wait_done(job, 120)
    check(body["result"] == "SUCCEEDED", f"after kill -9 of a shim: {body['state']} {body.get('reason')}")
    check(len(body["attempts"]) == 2, f"{len(body['attempts'])} attempts")
    check(c.series(job) == c.series(calm), "series differ from the undisturbed run")


def command_job(c, data):
    path = os.path.join(c.dir, "hello.yaml")
    open(path, "w").write("name: hello\nkind: command\ncommand: {argv: [/bin/sh, -c, "
                          "'echo rank $HEDDLE_RANK of $HEDDLE_WORLD_SIZE; test $HEDDLE_ATTEMPT -ge 1']}\n"
                          "parallel: {ranks: 2, cpus_per_rank: 1}\n")
    job = c.submit(path)
    check(c.wait_done(job, 60)["result"] == "SUCCEEDED", "command job failed")
    logs = wait_until("logs", lambda: (t := c.heddle("logs", job).stdout).count("of 2") == 2 and t, 10)
    check("rank 0 of 2" in logs and "rank 1 of 2" in logs, logs)
    bad = os.path.join(c.dir, "bad.yaml")
    open(bad, "w").write("name: missing\nkind: command\ncommand: {argv: [/no/such/program]}\n"
                         "parallel: {ranks: 1, cpus_per_rank: 1}\nschedule: {max_restarts: 0}\n")
    failed_with(c, bad, "/no/such/program")


FAULTS = [unknown_key_with_nearest_name, wrong_type_and_range_both_listed, override_unknown,
          unsupported_option_is_refused, yaml_bomb, config_file_missing, unknown_job, data_set_missing,
          data_set_truncated, data_set_of_another_tokenizer, vocabulary_larger_than_the_model,
          corrupt_checkpoint_block, never_fits, second_coordinator_on_the_same_state, port_in_use,
          killed_shim_is_a_retry, command_job]


def test(argv):
    wanted = [f for f in FAULTS if not argv or f.__name__ in argv]
    check(wanted, f"no such fault: {argv}")
    with Cluster(workers=2) as cluster:
        data = prepare_data(cluster)
        cluster.up()
        failures = []
        for fault in wanted:
            print(f"{fault.__name__}:", flush=True)
            try:
                fault(cluster, data)
            except Exception as error:  # noqa: BLE001 - all faults are reported, then the test fails
                print(f"  FAILED {type(error).__name__}: {error}", flush=True)
                failures.append(fault.__name__)
        print(json.dumps({"test": "faults", "cases": len(wanted), "failed": failures}))
        check(not failures, f"{len(failures)} of {len(wanted)} faults: {failures}")


main(test)
