"""The verbs of this package: `onset detect`, `run`, `send` and `keys`. The command line registers them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from engine.errors import ConfigError
from engine.schema import load_config
from stream import logs
from stream.allocator import return_what_is_freed
from stream.config import load_service_config
from stream.kafka_connection import KafkaConnection
from stream.kafka_sender import KafkaSender
from stream.offline import detect_recordings
from stream.producing import Producer
from stream.recording_source import load, messages, paced, stream_ids
from stream.reload import Reload
from stream.service import serve
from stream.signals import stopped_by_signals
from stream.wire import DtypeName, Message
from stream.zmq_keys import ClientKeys, read_public, read_secret, write_keys
from stream.zmq_producer import open_producer

_DTYPES = ("float32", "float16", "int16")


def detect(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, as `onset export` writes it.")],
    recordings: Annotated[
        list[Path], typer.Argument(help="Recordings: .npy, .npz or .csv, samples x channels.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="File for the events, one JSON object a line; - is stdout.")
    ],
    arrival: Annotated[
        int,
        typer.Option(
            min=0, help="Samples that come at once; 0: all (with --realtime a chunk). Changes no event."
        ),
    ] = 0,
    realtime: Annotated[
        float | None,
        typer.Option(help="Pace: 1 is that of the recording, 10 ten times that. Default: full speed."),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Emit from this score on, in place of the bundle's thresholds."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a step; default: all.")] = None,
) -> None:
    """Detect actions in recordings, through the same runtime that serves live streams.

    All recordings are streamed side by side; each becomes a stream named after its file. The events are those
    that a live stream of these samples would have given, in the same order.

    Example: onset detect BUNDLE recording.npy --output events.jsonl
    """
    if realtime is not None and realtime <= 0:
        raise ConfigError(f"--realtime is {realtime:g}, expected a pace above 0; leave it out for full speed")
    with _progress() as bar:
        task = bar.add_task("detecting", total=len(recordings))
        counters = detect_recordings(
            bundle,
            recordings,
            None if output == "-" else Path(output),
            arrival=arrival,
            realtime=realtime,
            min_score=min_score,
            threads=threads,
            progress=lambda fraction: bar.advance(task, fraction),
        )
        bar.update(task, completed=len(recordings))
    values = counters.snapshot()
    Console(stderr=True).print(
        f"{len(recordings)} recording{'s' * (len(recordings) > 1)}, {values['frames']:g} frames, "
        f"{values.get('events{action.ended}', 0):g} actions" + ("" if output == "-" else f" -> {output}"),
        highlight=False,
    )


def run(
    config: Annotated[
        Path, typer.Argument(help="The service's YAML; configs/service.yaml explains every key.")
    ],
) -> None:
    """Serve live streams: samples from ZeroMQ or Kafka in, events out, until SIGTERM or Ctrl-C.

    A log line that begins with "ready" says where it listens. `onset send` sends recordings there;
    stream/WIRE.md shows how to send from your own program. SIGHUP, or a change of the bundle's files, takes
    the bundle anew without losing a sample.

    Example: onset run configs/service.yaml
    """
    settings = load_service_config(config)
    logs.setup(settings.log)
    return_what_is_freed()
    reload = Reload(settings.bundle, settings.watch_bundle)
    with stopped_by_signals(reload, settings.grace) as stop:
        serve(settings, stop, reload=reload)


def send(
    recordings: Annotated[
        list[Path], typer.Argument(help="Recordings: .npy, .npz or .csv, samples x channels.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="Where `onset run` listens, e.g. tcp://127.0.0.1:5555; push|pub+bind|connect: before it. "
            "Or the topic that it reads: kafka://HOST:PORT/TOPIC.",
        ),
    ],
    rate: Annotated[
        float | None,
        typer.Option(help="Samples a second of the recordings, Hz: files do not tell it. Required."),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="1: real time; 10: ten times that; 0: as fast as it goes.")
    ] = 1.0,
    arrival: Annotated[
        int | None, typer.Option(min=1, help="Samples in one message; default: a tenth of a second.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or int16 (scaled to the recording's largest value).")
    ] = "float32",
    epoch: Annotated[
        int | None,
        typer.Option(min=0, help="Number of this start, above those before; default: the time in ns."),
    ] = None,
    server_key: Annotated[
        Path | None, typer.Option(help="The service's NAME.public, where it takes none but known keys.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Our own NAME.secret, with --server-key; `onset keys` makes one.")
    ] = None,
    patience: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Seconds to wait at the end while nothing more is taken; what is left is named then.",
        ),
    ] = 60.0,
    kafka_config: Annotated[
        Path | None,
        typer.Option(
            help="YAML of a Kafka `connection` (bootstrap, tls, sasl), for --to kafka:///TOPIC; "
            "configs/service-kafka.yaml explains its keys."
        ),
    ] = None,
) -> None:
    """Send recordings to a service as if they were live, all side by side.

    Nothing is dropped: where the service is slower than --speed, this waits, and it ends when the service
    has taken everything; else it says what is not known to have arrived, with status 2. (With --to pub+...
    it does not wait, and what the service cannot take is lost; Kafka keeps what the service has not read.)
    Each recording becomes a stream named after its file, which is the key of its messages in Kafka.

    Example: onset send recording.npy --to tcp://127.0.0.1:5555 --rate 50
    """
    if rate is None or not 0 < rate < float("inf"):
        raise ConfigError(
            f"--rate is {'missing' if rate is None else rate}: recordings do not say how many samples a "
            "second they hold, and the service refuses another rate than its bundle's (`frame.sample_rate` "
            "in its bundle.json); e.g. --rate 50"
        )
    if not 0 <= speed < float("inf"):
        raise ConfigError(f"--speed is {speed:g}, expected 1 for real time, or 0 for as fast as it goes")
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, expected {', '.join(_DTYPES)}")
    ids = stream_ids(recordings)
    size = arrival or max(1, round(rate / 10))
    start = epoch if epoch is not None else time.time_ns()
    now = time.time()
    loaded = [load(path) for path in recordings]
    scales = {
        stream: float(abs(samples[abs(samples) < float("inf")]).max()) / 32767 or 1.0
        for stream, samples in zip(ids, loaded, strict=True)
    }
    sources = [
        messages(stream, samples, rate, size, start, now if speed else None, speed or 1.0)
        for stream, samples in zip(ids, loaded, strict=True)
    ]
    # One queue for all, in the order in which the samples would have been measured.
    queue: Iterator[Message] = heapq.merge(*sources, key=lambda message: message.seq + len(message.samples))
    with _producer(to, server_key, key, kafka_config, patience) as producer, _progress() as bar:
        task = bar.add_task("sending", total=sum(len(samples) for samples in loaded))
        for message in paced(queue, speed) if speed else queue:
            scale = scales[message.stream] if dtype == "int16" else None
            producer.send(message, cast(DtypeName, dtype), scale)
            bar.advance(task, len(message.samples))
        bar.update(task, description="waiting for delivery")
    Console(stderr=True).print(
        f"{len(recordings)} recording{'s' * (len(recordings) > 1)} "
        + ("published at " if to.startswith("pub") else "sent, and taken by ")
        + to,
        highlight=False,
    )


def keys(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the two files.")],
    name: Annotated[str, typer.Option(help="Whose keys: NAME.public and NAME.secret.")] = "onset",
) -> None:
    """Make a pair of CURVE keys: NAME.public to give away, NAME.secret to keep (mode 0600).

    The service's configuration names its own .secret and the .public files of those who may send; a producer
    needs its own .secret and the service's .public.

    Example: onset keys --output keys --name camera-1
    """
    public, secret = write_keys(output, name)
    Console(stderr=True).print(f"keys: {public} (to give away), {secret} (to keep)", highlight=False)


def _producer(
    to: str, server_key: Path | None, key: Path | None, kafka_config: Path | None, patience: float
) -> Producer:
    if to.startswith("kafka:"):
        if server_key is not None or key is not None:
            raise ConfigError("--server-key and --key are for ZeroMQ; for Kafka there is --kafka-config")
        if kafka_config is None:
            return KafkaSender(to, delivery_timeout=max(1.0, patience))
        connection = load_config(KafkaConnection, kafka_config)
        connection = connection.relative_to(kafka_config.resolve().parent)
        return KafkaSender(to, connection, delivery_timeout=max(1.0, patience))
    if kafka_config is not None:
        raise ConfigError(f"--kafka-config is for --to kafka:///TOPIC, found {to!r}")
    if (server_key is None) != (key is None):
        raise ConfigError("--server-key and --key belong together, found one of them")
    curve = None
    if server_key is not None and key is not None:
        curve = ClientKeys(server=read_public(server_key), own=read_secret(key))
    return open_producer(to, linger=patience, curve=curve)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
