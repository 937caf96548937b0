"""What a broker is told: its place in the cluster, and limits that make tests quick and small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ALWAYS = """\
process.roles=broker,controller
controller.listener.names=CONTROLLER
inter.broker.listener.name=INTERNAL
auto.create.topics.enable=false
num.network.threads=2
num.io.threads=2
background.threads=2
num.recovery.threads.per.data.dir=1
log.cleaner.dedupe.buffer.size=4194304
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
"""

_SASL = """\
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.client.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.client.ssl.keystore.type=PEM
listener.name.client.ssl.keystore.location={keystore}
"""

_NODE = """\
node.id={id}
log.dirs={folder}/data
controller.quorum.voters={voters}
listeners=CLIENT://127.0.0.1:{client},INTERNAL://127.0.0.1:{internal},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=CLIENT://127.0.0.1:{advertised},INTERNAL://127.0.0.1:{internal}
listener.security.protocol.map=CLIENT:{protocol},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
default.replication.factor={copies}
offsets.topic.replication.factor={copies}
transaction.state.log.replication.factor={copies}
min.insync.replicas={in_sync}
transaction.state.log.min.isr={in_sync}
"""


@dataclass(frozen=True)
class Node:
    """A broker's place: its folder and ports of loopback, which outlive its process."""

    id: int
    folder: Path
    client: int
    """where it listens for clients"""
    advertised: int
    """where clients are told to come: the same, or a proxy before it"""
    internal: int
    """where it listens for the other brokers, and for who administers the cluster"""
    controller: int

    @property
    def properties(self) -> Path:
        """Its configuration file."""
        return self.folder / "server.properties"

    @property
    def log(self) -> Path:
        """What it has to say."""
        return self.folder / "log"


def write_properties(node: Node, cluster: Sequence[Node], keystore: Path | None) -> None:
    """Write the configuration of one of the cluster's nodes; with a keystore, clients need TLS and SCRAM."""
    copies = min(3, len(cluster))
    place = _NODE.format(
        **vars(node),
        voters=",".join(f"{other.id}@127.0.0.1:{other.controller}" for other in cluster),
        protocol="SASL_SSL" if keystore else "PLAINTEXT",
        copies=copies,
        in_sync=min(2, copies),
    )
    node.folder.mkdir(parents=True)
    node.properties.write_text(_ALWAYS + place + (_SASL.format(keystore=keystore) if keystore else ""))
