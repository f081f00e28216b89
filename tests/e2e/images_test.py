#!/usr/bin/env python3
"""The container images run a job: three containers on three hosts, mutual TLS, one container killed on the way.

Builds heddle/coordinator and heddle/worker-cpu with docker/build.sh, starts one coordinator and two workers from
the images' own entry points, trains on two ranks, kills one worker container with everything in it, starts it again
and expects the job to finish from its checkpoint (interop I21). With a Docker engine the hosts are containers of a
Docker network; without one Debian's buildah builds on a base made by debootstrap, and each host is a network
namespace in which `buildah run --isolation chroot` starts the container's file system. Prints one JSON line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from support.faultlab.cluster import ROOT, Cluster, check, main, prepare_data, skip, wait_until, write_config
from support.faultlab.netns import SUBNET, Hosts, usable

UID = 10001
STATE = {"coordinator": "/var/lib/heddle/state", "worker": "/var/lib/heddle/worker"}
WORKERS = ("worker-1", "worker-2")


def run(*argv, env=None, timeout=600):
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    check(done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def mounts(folder, name):
    """(host path, container path, mode) of a container, as docker/compose.yaml mounts them."""
    kind = "coordinator" if name == "coordinator" else "worker"
    return [(f"{folder}/{name}", STATE[kind], "rw"), (f"{folder}/checkpoints", "/var/lib/heddle/checkpoints", "rw"),
            (f"{folder}/tls/{name}", "/etc/heddle/tls", "ro"), (f"{folder}/data", "/data", "ro")]


class Docker:
    """Containers of an engine, on a Docker network of their own."""

    def __init__(self, folder):
        self.folder, self.tag = folder, f"heddle-test-{os.getpid()}"
        self.address = {"coordinator": f"{SUBNET}.10", "worker-1": f"{SUBNET}.11", "worker-2": f"{SUBNET}.12"}
        self.env = dict(os.environ, HEDDLE_ENGINE="docker", HEDDLE_TAG=self.tag)

    def __enter__(self):
        run("docker/build.sh", env=self.env)
        run("docker", "network", "create", "--subnet", f"{SUBNET}.0/24", self.tag)
        return self

    def start(self, name, image, extra):
        volumes = [w for host, inside, mode in mounts(self.folder, name) for w in ("-v", f"{host}:{inside}:{mode}")]
        command = json.loads(run("docker", "image", "inspect", "-f", "{{json .Config.Cmd}}", f"{image}:{self.tag}"))
        run("docker", "run", "-d", "--name", f"{self.tag}-{name}", "--hostname", name, "--network", self.tag,
            "--network-alias", name, "--ip", self.address[name], *volumes, f"{image}:{self.tag}", *command, *extra)

    def inside(self, name, *argv):
        return ["docker", "exec", f"{self.tag}-{name}", *argv]

    def kill(self, name):
        run("docker", "rm", "-f", f"{self.tag}-{name}")

    def logs(self, name):
        return run("docker", "logs", "--tail", "40", f"{self.tag}-{name}")

    def __exit__(self, *_):
        for name in self.address:
            subprocess.run(["docker", "rm", "-f", f"{self.tag}-{name}"], capture_output=True, check=False)
        subprocess.run(["docker", "network", "rm", self.tag], capture_output=True, check=False)
        images = [f"heddle/{n}:{self.tag}" for n in ("coordinator", "worker-cpu")]
        subprocess.run(["docker", "rmi", *images], capture_output=True, check=False)


class Buildah:
    """Containers' file systems by buildah, hosts by network namespaces. Needs root."""

    BASE = "localhost/heddle-base:bookworm"

    def __init__(self, folder):
        self.folder = folder
        self.hosts = Hosts("coordinator", *WORKERS)
        self.address = self.hosts.address
        # The base stays for the next run; everything else goes.
        self.store = os.path.join(ROOT, "build", "image-test")
        self.env = dict(os.environ, HEDDLE_ENGINE="buildah", HEDDLE_BASE=self.BASE, HEDDLE_TAG="test",
                        BUILDAH_ISOLATION="chroot", CONTAINERS_STORAGE_CONF=os.path.join(self.store, "storage.conf"))
        self.env.pop("STORAGE_DRIVER", None)
        self.processes = {}

    @staticmethod
    def missing():
        for program in ("buildah", "debootstrap"):
            if not shutil.which(program) and not os.path.exists(f"/usr/sbin/{program}"):
                return f"no Docker engine, and {program} is not installed"
        return usable()

    def buildah(self, *argv, timeout=600):
        return run("buildah", *argv, env=self.env, timeout=timeout).strip()

    def probe(self):
        """Skips where this machine lets no container start."""
        container = self.buildah("from", "--pull-never", self.BASE)
        done = subprocess.run(["buildah", "run", "--isolation", "chroot", container, "--", "/bin/true"], env=self.env,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.buildah("rm", container)
        if done.returncode != 0:
            skip(f"buildah cannot run a container here: {done.stdout.strip()[-300:]}")

    def make_base(self):
        os.makedirs(self.store, exist_ok=True)
        with open(self.env["CONTAINERS_STORAGE_CONF"], "w", encoding="utf-8") as f:
            f.write(f'[storage]\ndriver = "vfs"\ngraphroot = "{self.store}/graph"\nrunroot = "{self.store}/run"\n')
        if self.BASE in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
            return
        root = os.path.join(self.store, "base")
        shutil.rmtree(root, ignore_errors=True)
        done = subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, env=dict(os.environ, DEBIAN_FRONTEND="noninteractive"))
        if done.returncode != 0:
            skip(f"debootstrap cannot make a base image: {done.stdout.strip().splitlines()[-1:]}")
        container = self.buildah("from", "scratch")
        self.buildah("add", container, root, "/")
        done = subprocess.run(["buildah", "commit", "--rm", container, self.BASE], env=self.env, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:  # inside a chroot, whose / is no mount point
            skip(f"buildah cannot store an image here: {done.stdout.strip()[-300:]}")
        shutil.rmtree(root)

    def __enter__(self):
        self.make_base()
        self.probe()
        self.clean()
        run("docker/build.sh", env=self.env)
        self.hosts.__enter__()
        with open(os.path.join(self.folder, "hosts"), "w", encoding="utf-8") as f:
            f.write("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in self.address.items()))
        return self

    def command(self, name, argv):
        volumes = mounts(self.folder, name) + [(f"{self.folder}/hosts", "/etc/hosts", "ro")]
        flags = [w for host, inside, mode in volumes for w in ("-v", f"{host}:{inside}:{mode}")]
        return self.hosts.command(name, ["buildah", "run", "--isolation", "chroot", "--no-hosts", "--hostname", name, *flags,
                                         f"t-{name}", "--", *argv])

    def start(self, name, image, extra):
        if f"t-{name}" not in self.buildah("containers", "--format", "{{.ContainerName}}").split():
            self.buildah("from", "--name", f"t-{name}", "--pull-never", f"localhost/{image}:test")
        config = json.loads(self.buildah("inspect", f"t-{name}"))["OCIv1"]["config"]
        argv = [*config["Entrypoint"], *config["Cmd"], *extra]
        with open(os.path.join(self.folder, f"{name}.log"), "ab") as log:
            self.processes[name] = subprocess.Popen(self.command(name, argv), stdout=log, stderr=log, env=self.env,
                                                    stdin=subprocess.DEVNULL, start_new_session=True)

    def inside(self, name, *argv):
        return self.command(name, argv)

    def kill(self, name):
        """kill -9 of all processes of the host at once, the container's and buildah's."""
        for _ in range(20):
            pids = run("ip", "netns", "pids", self.hosts.namespace(name)).split()
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)

    def logs(self, name):
        with open(os.path.join(self.folder, f"{name}.log"), encoding="utf-8", errors="replace") as f:
            return f.read()[-3000:]

    def clean(self):
        for name in self.address:
            subprocess.run(["buildah", "rm", f"t-{name}"], env=self.env, capture_output=True, check=False)
        images = [f"localhost/heddle/{n}:test" for n in ("coordinator", "worker-cpu")]
        subprocess.run(["buildah", "rmi", *images], env=self.env, capture_output=True, check=False)

    def __exit__(self, *_):
        for name in self.address:
            self.kill(name)
        self.hosts.__exit__()
        self.clean()


def choose(folder):
    if shutil.which("docker") and subprocess.run(["docker", "version"], capture_output=True).returncode == 0:
        return Docker(folder)
    reason = Buildah.missing()
    if reason:
        skip(reason)
    return Buildah(folder)


def prepare(folder, cluster):
    """State folders, data set, configuration and certificates, owned by the images' user."""
    for name in ("coordinator", "checkpoints", *WORKERS):
        os.makedirs(os.path.join(folder, name), mode=0o700, exist_ok=True)
    prepare_data(cluster, name="data/set")
    os.rename(write_config(cluster, "/data/set", name="images", steps=400, save=40), os.path.join(folder, "data/job.yaml"))
    for parent, _, files in os.walk(folder):
        for path in [parent] + [os.path.join(parent, f) for f in files]:
            os.chown(path, UID, UID)
            os.chmod(path, 0o755 if os.path.isdir(path) and path in (folder, f"{folder}/data") else
                     os.stat(path).st_mode | (0o500 if os.path.isdir(path) else 0o400))
    run("docker/make-certs.sh", f"{folder}/tls", "coordinator", *WORKERS)
    os.chmod(f"{folder}/tls", 0o755)


class Job:
    """The CLI inside the coordinator's container."""

    def __init__(self, engine):
        self.engine = engine

    def heddle(self, *args, ok=True, timeout=120):
        done = subprocess.run(self.engine.inside("coordinator", "/usr/local/bin/heddle", *args, "-o", "json"),
                              env=self.engine.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=timeout)
        if ok:
            check(done.returncode == 0, f"heddle {' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def json(self, *args, timeout=120):
        return json.loads(self.heddle(*args, timeout=timeout).stdout)

    def connected(self):
        done = self.heddle("status", ok=False)
        return done.returncode == 0 and json.loads(done.stdout)["nodes"]["connected"]


def job_survives(engine):
    cli = Job(engine)
    worker_flags = {n: ["--cpus", "1", "--data-address", engine.address[n]] for n in WORKERS}
    engine.start("coordinator", "heddle/coordinator", [])
    for name in WORKERS:
        engine.start(name, "heddle/worker-cpu", worker_flags[name])
    wait_until("two workers connected", lambda: cli.connected() == 2, 60, interval=0.5)
    job = cli.json("submit", "/data/job.yaml")["id"]
    wait_until("a committed checkpoint", lambda: any(c["state"] == "COMMITTED" for c in
                                                     cli.json("ckpt", "ls", job)["checkpoints"]), 120, interval=0.5)
    engine.kill("worker-2")
    killed = time.monotonic()
    engine.start("worker-2", "heddle/worker-cpu", worker_flags["worker-2"])
    cli.heddle("wait", job, "--timeout", "200s", ok=False, timeout=230)
    body = cli.json("describe", job)
    check(body["state"] == "DONE" and body["result"] == "SUCCEEDED", f"the job ended {body}")
    check(body["step"] == 400 and body["restarts"] >= 1, f"no recovery seen: {body}")
    check(len(set(body["attempts"][-1]["workers"])) == 2, f"the ranks were not on two hosts: {body['attempts']}")
    return {"restarts": body["restarts"], "seconds_from_kill_to_end": round(time.monotonic() - killed, 1)}


def test(argv):
    os.chdir(ROOT)
    cluster = Cluster(workers=0)
    folder = cluster.dir
    started = time.monotonic()
    try:
        engine = choose(folder)
        prepare(folder, cluster)
        with engine:
            built = time.monotonic()
            try:
                figures = job_survives(engine)
            except BaseException:
                for name in engine.address:
                    print(f"--- {name}\n{engine.logs(name)}", file=sys.stderr)
                raise
        print(json.dumps({"test": "images", "engine": type(engine).__name__.lower(),
                          "build_seconds": round(built - started, 1), **figures}))
    finally:
        if os.environ.get("HEDDLE_KEEP"):
            print(f"kept {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(test)
