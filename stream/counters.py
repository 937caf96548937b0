"""What the runtime counts, as Prometheus metrics in a registry of their own.

One `Counters` belongs to one runtime; nothing is global, so that two runtimes in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge


class Counters:
    """The metrics; names are `onset_*`, counters end in `_total` when they are exported."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"onset_{name}", text, labels, registry=self.registry)

        self.messages = counter("messages", "messages that were read and offered to the runtime")
        self.samples = counter("samples", "samples in these messages")
        self.frames = counter("frames", "frames that went through the model")
        self.masked_frames = counter("masked_frames", "of these, frames that were missing and masked")
        self.steps = counter("steps", "runs of the network, each over a batch of streams")
        self.events = counter("events", "events that left, by type", ("type",))
        self.events_delivered = counter("events_delivered", "events that a Kafka has")
        self.events_dropped = counter("events_dropped", "events that a full spool dropped (when_full)")
        self.refused = counter("refused", "messages that were refused, by reason", ("reason",))
        self.repeated = counter("repeated_samples", "samples that had come before, dropped")
        self.late = counter("late_samples", "samples that came after they were given up, dropped")
        self.reordered = counter("reordered_messages", "messages put in order within the reorder window")
        self.gaps_filled = counter("gaps_filled", "gaps that were short enough to be masked")
        self.gaps_too_long = counter("gaps_too_long", "gaps that ended a stream's epoch")
        self.epochs = counter("epochs", "beginnings of a stream: first, after a long gap, after a restart")
        self.nonfinite = counter("nonfinite_outputs", "steps of a stream whose outputs were not finite")
        self.streams_refused = counter("streams_refused", "streams that found no place (max_streams)")
        self.streams_evicted = counter("streams_evicted", "streams that fell silent (idle_timeout)")
        self.peers_disconnected = counter(
            "peers_disconnected",
            "connections that went away, also those that sent a message too large to read",
        )
        self.open_streams = Gauge("onset_open_streams", "streams that hold a slot", registry=self.registry)

    def snapshot(self) -> Mapping[str, float]:
        """All values, as `name` or `name{label}`, without `onset_` and `_total`; without those never used."""
        values: dict[str, float] = {}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if sample.name.endswith("_created"):
                    continue
                name = sample.name.removeprefix("onset_").removesuffix("_total")
                labels = ",".join(sample.labels.values())
                values[f"{name}{{{labels}}}" if labels else name] = sample.value
        return values

    def summary(self) -> str:
        """One line for a log: what is not zero."""
        return ", ".join(f"{name} {value:g}" for name, value in self.snapshot().items() if value) or "nothing"
