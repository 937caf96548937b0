"""What the runtime counts, as Prometheus metrics in a registry of their own.

One `Counters` belongs to one runtime; nothing is global, so that two runtimes in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stream.events import Event

# Upper bounds. A step of a small network takes less than a millisecond, one of a large batch some hundreds.
_STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_END_TO_END_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)


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
        self.sink_events_lost = counter("sink_events_lost", "events that a sink did not take", ("sink",))
        self.sink_errors = counter("sink_errors", "attempts to write to a sink that failed", ("sink",))
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
            "connections that went away, also those that were refused",
        )
        self.open_streams = Gauge("onset_open_streams", "streams that hold a slot", registry=self.registry)
        self.zmq_refused = counter(
            "zmq_refused", "ZeroMQ connections that were refused or broke off in their handshake", ("why",)
        )
        self.samples_lost = counter(
            "samples_lost", "samples from a publisher that never came here, or in messages that were refused"
        )

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"onset_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"onset_{name}", text, buckets=bounds, registry=self.registry)

        # Labels are names that the program or the bundle knows, never words from outside: each is a series.
        self.step_seconds = histogram("step_seconds", "seconds of one run of the network", _STEP_SECONDS)
        self.batch_streams = histogram("batch_streams", "streams in one run of the network", _STREAMS)
        self.end_to_end_seconds = histogram(
            "end_to_end_seconds",
            "seconds from a sample's capture, by its producer's clock, to the events that it allowed",
            _END_TO_END_SECONDS,
        )
        self.actions = counter("actions", "events of actions, by type and class", ("type", "label"))
        self.queued_messages = gauge("queued_messages", "messages that wait to be offered")
        self.lag_messages = gauge("lag_messages", "messages behind a partition's end", ("topic", "partition"))
        self.spool_events = gauge("spool_events", "events that wait on disk for the broker")
        self.dropped_messages = counter("dropped_messages", "messages dropped unread, by reason", ("reason",))
        self.dead_letters = counter(
            "dead_letters", "messages put aside as unreadable, by reason", ("reason",)
        )
        self.dead_letters_lost = counter(
            "dead_letters_lost", "of these, those that could not be kept, by cause", ("cause",)
        )
        self.transactions = counter("transactions", "transactions, by outcome", ("outcome",))
        self.rebalances = counter("rebalances", "times that partitions were assigned anew")
        self.restarts = counter("restarts", "times that a worker began anew from its last commit")
        self.bundle_swaps = counter("bundle_swaps", "times that another bundle took over under way")
        self.bundle_swaps_failed = counter(
            "bundle_swaps_failed", "times that another bundle could not take over, and the old one went on"
        )

    def observe_events(self, events: Iterable[Event], now: float) -> None:
        """Events leave: how long, at wall time `now`, after the samples that allowed them were captured?"""
        for event in events:
            if event.captured is not None:
                # A producer's clock may run ahead of this one.
                self.end_to_end_seconds.observe(max(0.0, now - event.captured))

    def snapshot(self) -> Mapping[str, float]:
        """All values, as `name` or `name{label}`, without `onset_` and `_total`; without those never used.

        Of a histogram its `name_count` alone: what it adds up is time, which no two runs share.
        """
        values: dict[str, float] = {}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if sample.name.endswith("_created"):
                    continue
                if metric.type == "histogram" and not sample.name.endswith("_count"):
                    continue
                name = sample.name.removeprefix("onset_").removesuffix("_total")
                labels = ",".join(sample.labels.values())
                values[f"{name}{{{labels}}}" if labels else name] = sample.value
        return values

    def summary(self) -> str:
        """One line for a log: what is not zero."""
        return ", ".join(f"{name} {value:g}" for name, value in self.snapshot().items() if value) or "nothing"
