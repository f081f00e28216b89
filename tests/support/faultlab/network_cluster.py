"""A cluster whose daemons stand in network namespaces of their own, with mutual TLS between them."""

import os
import subprocess

from support.faultlab.cluster import BIN, Cluster, processes, wait_until
from support.faultlab.netns import make_certificates


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
