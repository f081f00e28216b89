"""Hosts made of network namespaces: one namespace per host, veth pairs on a bridge. Needs root and iproute2."""

import os
import shutil
import subprocess

SUBNET = "10.93.7"


def usable():
    """None, or the reason why namespaces cannot be used here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "iproute2 is missing"
    probe = f"hdl-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], stderr=subprocess.DEVNULL).returncode != 0:
        return "`ip netns add` is refused here"
    bridge = run("ip", "-n", probe, "link", "add", "br0", "type", "bridge", check=False)
    subprocess.run(["ip", "netns", "del", probe], check=False)
    if bridge.returncode != 0:
        return f"no bridge in a network namespace here: {bridge.stdout.strip()}"
    return None


def run(*argv, check=True):
    return subprocess.run(argv, check=check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Hosts:
    """`names` as hosts SUBNET.1, SUBNET.2, ... in a switch namespace of their own."""

    def __init__(self, *names):
        self.tag = f"h{os.getpid() % 100000}"
        self.switch = f"{self.tag}-sw"
        self.names = names
        self.address = {n: f"{SUBNET}.{i + 1}" for i, n in enumerate(names)}

    def __enter__(self):
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def _build(self):
        run("ip", "netns", "add", self.switch)
        run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            ns = self.namespace(name)
            run("ip", "netns", "add", ns)
            run("ip", "-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{i}", "netns", self.switch)
            run("ip", "-n", self.switch, "link", "set", f"p{i}", "master", "br0", "up")
            run("ip", "-n", ns, "addr", "add", f"{self.address[name]}/24", "dev", "eth0")
            run("ip", "-n", ns, "link", "set", "eth0", "up")
            run("ip", "-n", ns, "link", "set", "lo", "up")

    def namespace(self, name):
        return f"{self.tag}-{name}"

    def command(self, name, argv):
        return ["ip", "netns", "exec", self.namespace(name), *argv]

    def cut(self, name):
        run("ip", "-n", self.switch, "link", "set", f"p{self.names.index(name)}", "down")

    def heal(self, name):
        run("ip", "-n", self.switch, "link", "set", f"p{self.names.index(name)}", "up")

    def _remove(self):
        for ns in [self.switch] + [self.namespace(n) for n in self.names]:
            run("ip", "netns", "del", ns, check=False)

    def __exit__(self, *_):
        self._remove()


def make_certificates(folder, addresses):
    """A CA and one certificate for all `addresses`; returns (ca, cert, key) paths. For tests only."""
    os.makedirs(folder, exist_ok=True)
    path = {n: os.path.join(folder, n) for n in ("ca.pem", "ca.key", "node.pem", "node.key", "node.csr", "ext")}
    names = ",".join([f"IP:{a}" for a in addresses] + ["DNS:localhost"])
    with open(path["ext"], "w") as f:
        f.write(f"subjectAltName={names}\n")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run("openssl", "req", "-x509", *curve, "-keyout", path["ca.key"], "-out", path["ca.pem"], "-days", "2",
        "-subj", "/CN=heddle test CA")
    run("openssl", "req", *curve, "-keyout", path["node.key"], "-out", path["node.csr"], "-subj", "/CN=heddle node")
    run("openssl", "x509", "-req", "-in", path["node.csr"], "-CA", path["ca.pem"], "-CAkey", path["ca.key"],
        "-CAcreateserial", "-days", "2", "-extfile", path["ext"], "-out", path["node.pem"])
    return path["ca.pem"], path["node.pem"], path["node.key"]
