"""Apache Kafka in KRaft mode, as child processes on loopback: one broker or three, to be killed at will.

Every broker is a controller, too. It has a listener for the tests' clients (plain, or TLS with SCRAM; behind
a proxy where the network is to be cut), and one for the brokers themselves that is never cut. A broker ends
with the process that started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from tests.kafka.certificates import write_certificates
from tests.kafka.jars import class_path, java
from tests.kafka.ports import free_port
from tests.kafka.properties import Node, write_properties
from tests.kafka.proxy import Proxy

START_SECONDS = 90.0
"""how long a broker may take before it answers"""
STOP_SECONDS = 60.0
"""how long it may take to hand over and leave"""

# The shell becomes the broker. Its child waits for the end of a pipe that only this process holds, then kills
# the broker: that works when pytest itself is killed, and whichever thread started the broker.
_GUARDED = 'exec 3<&0; (read -r _ <&3; kill -9 $$) & exec "$@" 3<&- </dev/null'
_JVM = [
    "-Xmx256m",
    "-Xms64m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.apache.logging.log4j.level=INFO",
]


def available() -> str | None:
    """Why there can be no broker here, or None when there can. The first call may have Maven fetch it."""
    try:
        java(), class_path()
    except RuntimeError as problem:
        return str(problem)
    return None


@dataclass(frozen=True)
class Credentials:
    """What a client needs of a cluster that asks who it is."""

    user: str
    password: str
    ca_file: Path


class Cluster:
    """Brokers 0, 1, ... with their data in `folder`; a context manager that starts them and kills them."""

    def __init__(
        self, folder: Path, brokers: int = 1, *, sasl: bool = False, advertised_through_proxy: bool = False
    ) -> None:
        """With `sasl`, clients come by SASL_SSL and SCRAM-SHA-512, else in the clear.

        With `advertised_through_proxy`, they reach broker i through `proxies[i]` alone.
        """
        ports = [free_port() for _ in range(brokers)]
        self.proxies = [Proxy(port) for port in ports] if advertised_through_proxy else []
        """the clients' way to each broker; empty where they come directly"""
        advertised = [proxy.port for proxy in self.proxies] or ports
        self.bootstrap = [f"127.0.0.1:{port}" for port in advertised]
        """where clients begin: `host:port` of each broker"""
        self.credentials: Credentials | None = None
        """the one user, where clients have to say who they are"""
        keystore = None
        if sasl:
            ca_file, keystore = write_certificates(folder / "tls")
            self.credentials = Credentials("onset", secrets.token_urlsafe(12), ca_file)
        self._nodes = [
            Node(i, folder / str(i), ports[i], advertised[i], free_port(), free_port())
            for i in range(brokers)
        ]
        for node in self._nodes:
            write_properties(node, self._nodes, keystore)
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def client_settings(self) -> dict[str, Any]:
        """Keyword arguments with which any client of kafka-python comes in."""
        settings: dict[str, Any] = {"bootstrap_servers": self.bootstrap}
        if self.credentials:
            settings |= {
                "security_protocol": "SASL_SSL",
                "ssl_cafile": str(self.credentials.ca_file),
                "sasl_mechanism": "SCRAM-SHA-512",
                "sasl_plain_username": self.credentials.user,
                "sasl_plain_password": self.credentials.password,
            }
        return settings

    def create_topic(
        self, name: str, partitions: int = 1, replication: int | None = None, config: Mapping[str, str] = {}
    ) -> None:
        """Make a topic, with as many copies as the cluster's own topics have; each partition has a leader."""
        topic = {
            "num_partitions": partitions,
            "replication_factor": -1 if replication is None else replication,
            "configs": dict(config),
        }
        with contextlib.closing(self._admin(list(self._running))) as admin:
            admin.create_topics({name: topic}, wait_for_metadata=True)

    def start(self, i: int) -> None:
        """Start broker i on its old ports and data, and wait until it takes part in the cluster.

        Raises RuntimeError with the end of its log when it does not.
        """
        self._launch(i)
        self._wait(i)

    def stop(self, i: int) -> None:
        """Ask broker i to leave, and wait until it has: it hands its partitions to the others first."""
        broker = self._running.pop(i)
        broker.send_signal(signal.SIGTERM)
        try:
            broker.wait(STOP_SECONDS)
        finally:
            _end(broker)

    def kill(self, i: int) -> None:
        """Kill broker i where it stands (SIGKILL)."""
        _end(self._running.pop(i))

    def __enter__(self) -> Cluster:
        try:
            self._format()
            for i in range(len(self._nodes)):
                self._launch(i)
            for i in range(len(self._nodes)):
                self._wait(i)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        while self._running:
            _end(self._running.popitem()[1])
        for proxy in self.proxies:
            proxy.close()

    def _format(self) -> None:
        """Write what must be on a broker's disk before it ever runs: its cluster's name, and the users."""
        cluster = secrets.token_hex(11)  # reads as the base64 of 16 bytes, and never begins with a dash
        for node in self._nodes:
            command = [java(), *_JVM, "-cp", class_path(), "kafka.tools.StorageTool", "format"]
            command += ["--cluster-id", cluster, "--config", str(node.properties)]
            if self.credentials:
                user = f"name={self.credentials.user},password={self.credentials.password}"
                command += ["--add-scram", f"SCRAM-SHA-512=[{user}]"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
            if run.returncode:
                raise RuntimeError(f"Kafka's storage cannot be formatted: {run.stdout}{run.stderr}")

    def _launch(self, i: int) -> None:
        if i in self._running:
            raise ValueError(f"broker {i} runs already; stop or kill it first")
        node = self._nodes[i]
        command = [java(), *_JVM, "-cp", class_path(), "kafka.Kafka", str(node.properties)]
        with node.log.open("ab") as log:
            self._running[i] = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDED, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt of the terminal is for pytest, which then ends this
            )

    def _wait(self, i: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._running[i].poll() is None:
            if self._answers(i):
                return
            time.sleep(0.1)
        log = self._nodes[i].log.read_text(errors="replace")
        self.kill(i)
        raise RuntimeError(f"broker {i} did not start:\n{log[-4000:]}")

    def _answers(self, i: int) -> bool:
        """Whether broker i serves clients: it listens long before, but is fenced until it has caught up."""
        try:
            socket.create_connection(("127.0.0.1", self._nodes[i].internal), timeout=1).close()
            with contextlib.closing(self._admin([i], bootstrap_timeout_ms=5000)) as admin:
                brokers = admin.describe_cluster()["brokers"]
                return any(broker["broker_id"] == i and not broker["is_fenced"] for broker in brokers)
        except (OSError, KafkaError):
            return False

    def _admin(self, brokers: list[int], **settings: Any) -> KafkaAdminClient:
        """By the brokers' own listener, which asks for no password and is never cut."""
        servers = [f"127.0.0.1:{self._nodes[i].internal}" for i in brokers]
        return KafkaAdminClient(bootstrap_servers=servers, reconnect_backoff_max_ms=200, **settings)


def _end(broker: subprocess.Popen[bytes]) -> None:
    """Kill a broker and its guard, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(broker.pid, signal.SIGKILL)
    broker.wait()
    assert broker.stdin is not None
    broker.stdin.close()
