"""Nodes of a Ray cluster on this machine, with `ray start` as on real ones; one may have a network of its own."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

# How soon Ray takes a node that is silent for dead: its own figures make that a minute.
HEALTH = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_timeout_ms": 5000,
          "health_check_failure_threshold": 3}  # fmt: skip
START_S = 60
BRIDGE = ("10.213.7.1", "10.213.7.2")  # of this machine and of the other namespace
SPACE, LINK, OTHER = "simreal_test", "simreal0", "simreal1"


class RayNode:
    """A node in a process of its own, ended with all that it has started."""

    def __init__(self, *options: str, inside: Sequence[str] = ()):
        # Sockets need short paths, shorter than pytest's.
        self.folder = Path(tempfile.mkdtemp(prefix="ray_"))
        self.log = self.folder / "start.log"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block",
                   "--num-cpus=2", f"--temp-dir={self.folder}", f"--object-store-memory={100 * 2**20}",
                   "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*inside, *command, *options], stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + START_S
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """At once, as a power failure does."""
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid)
            everyone = [started, *started.children(recursive=True)]
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()  # nobody sees another die
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def own_token() -> Iterator[None]:
    """Nodes and drivers from here on have a token of their own: nobody else gives this cluster work."""
    if "RAY_AUTH_TOKEN" in os.environ:  # another cluster of the tests is there; a process has one token for all
        yield
        return
    names = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    _read_token()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _read_token()


def _read_token() -> None:
    """Ray reads the variables once in a process, if it has tokens at all."""
    with contextlib.suppress(ImportError):
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def head(address: str = "127.0.0.1") -> Iterator[str]:
    """The head of a cluster; its HOST:PORT."""
    port = free_port()
    with own_token():
        node = RayNode(
            "--head", "--include-dashboard=false", f"--node-ip-address={address}", f"--port={port}",
            f"--system-config={json.dumps(HEALTH)}",
        )  # fmt: skip
        try:
            node.wait_for("Ray runtime started")
            yield f"{address}:{port}"
        finally:
            node.close()


@contextlib.contextmanager
def another(cluster: str, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> Iterator[RayNode]:
    """Another node of it."""
    node = RayNode(f"--address={cluster}", f"--node-ip-address={address}", inside=inside)
    try:
        node.wait_for("Ray runtime started")
        yield node
    finally:
        node.close()


def why_no_namespace() -> str:
    """Why this machine gives no network namespace to a test; nothing if it does."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    made = ip(f"netns add {SPACE}_try")
    ip(f"netns del {SPACE}_try")
    return "" if not made else f"this machine gives no network namespaces: {made}"


@contextlib.contextmanager
def namespace() -> Iterator[Sequence[str]]:
    """A network of its own with a link to this machine's; what to put before a command to run it there."""
    _tear_down()
    try:
        for words in (
            f"netns add {SPACE}", f"link add {LINK} type veth peer name {OTHER} netns {SPACE}",
            f"addr add {BRIDGE[0]}/30 dev {LINK}", f"link set {LINK} up", f"-n {SPACE} link set lo up",
            f"-n {SPACE} addr add {BRIDGE[1]}/30 dev {OTHER}", f"-n {SPACE} link set {OTHER} up",
        ):  # fmt: skip
            assert not (problem := ip(words)), f"ip {words}: {problem}"
        yield ("ip", "netns", "exec", SPACE)
    finally:
        _tear_down()


def unplug() -> None:
    """Nothing arrives at the other namespace any more, and nothing says so."""
    ip(f"link set {LINK} down")


def _tear_down() -> None:
    ip(f"link del {LINK}")
    ip(f"netns del {SPACE}")


def ip(words: str) -> str:
    """Errors of a call of `ip`."""
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""
