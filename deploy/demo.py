"""`make demo`: a real service, three real recordings sent to it over ZeroMQ, what it says, and how well.

Writes demo/events.jsonl and demo/timeline.png. Needs no torch.
"""

from __future__ import annotations

import argparse
import heapq
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stream.offline import detect_recordings
from stream.recording_source import load, messages, paced
from stream.zmq_producer import open_producer
from trainer.annotations import read_annotations
from trainer.plotting import plot
from trainer.predictions import read_predictions
from trainer.scoring import parse_tious, score

HERE = Path(__file__).resolve().parent / "demo"
RATE = 50.0
PALETTE = (
    "bright_blue", "bright_cyan", "bright_green", "bright_magenta", "bright_yellow", "bright_red",
    "cyan", "green", "magenta", "yellow", "blue", "red",
)  # fmt: skip


def main() -> int:
    """Run the demo; the exit status is that of the service."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--speed", type=float, default=25.0, help="times real time")
    options = parser.parse_args()
    if not 0 < options.speed < float("inf"):
        parser.error(f"--speed is {options.speed:g}, expected times real time, above 0")
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    events = output.resolve() / "events.jsonl"
    events.unlink(missing_ok=True)
    recordings = sorted((HERE / "recordings").glob("*.npy"))
    console = Console()
    console.rule("[bold]Onset[/] · live action detection")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "service.yaml"
        settings = {
            "bundle": str(HERE / "bundle"),
            "source": {"zmq": {"endpoint": "tcp://127.0.0.1:*"}},
            "sinks": [{"file": str(events)}],
        }
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        service = subprocess.Popen(
            [sys.executable, "-m", "onset", "run", str(config)], stderr=subprocess.PIPE, text=True
        )
        try:
            address = wait_until_ready(service)
            console.print(
                f"The service listens on [cyan]{address}[/]; {len(recordings)} recordings of people that it "
                f"has never seen are sent at {options.speed:g}x real time.\n"
            )
            watch(console, service, recordings, address, events, options.speed)
        finally:
            service.send_signal(signal.SIGTERM)
            status = service.wait(timeout=30)
    report(console, recordings, events)
    picture = output / "timeline.png"
    plot(events, picture, read_annotations(HERE / "annotations.json"))
    console.print(f"\nevents  [bold]{output / 'events.jsonl'}[/]\npicture [bold]{picture}[/]")
    return status


def wait_until_ready(service: subprocess.Popen[str]) -> str:
    """The address in the service's "ready" line; what it logs afterwards is read and dropped."""
    assert service.stderr is not None
    lines: list[str] = []
    for line in service.stderr:
        lines.append(line)
        if "ready: listening on " in line:
            threading.Thread(target=service.stderr.read, daemon=True).start()
            return line.split("ready: listening on ")[1].split()[0]
    raise SystemExit("the service did not start:\n" + "".join(lines))


def watch(
    console: Console,
    service: subprocess.Popen[str],
    recordings: list[Path],
    address: str,
    events: Path,
    speed: float,
) -> None:
    """Send the recordings from a thread and show events as the service writes them."""
    loaded = {path.stem: load(path) for path in recordings}
    total = sum(len(samples) for samples in loaded.values())
    sent: queue.SimpleQueue[int] = queue.SimpleQueue()

    def produce() -> None:
        now, epoch = time.time(), time.time_ns()
        sources = [messages(name, samples, RATE, 25, epoch, now, speed) for name, samples in loaded.items()]
        order = heapq.merge(*sources, key=lambda message: message.seq + len(message.samples))
        with open_producer(address) as producer:
            for message in paced(order, speed):
                producer.send(message, "float32", None)
                sent.put(len(message.samples))

    columns = (
        TextColumn("[bold]streaming"), BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn(),
    )  # fmt: skip
    producer_thread = threading.Thread(target=produce, daemon=True)
    producer_thread.start()
    deadline = time.monotonic() + max(map(len, loaded.values())) / RATE / speed + 60
    ended, position = 0, 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        while ended < len(loaded):
            if service.poll() is not None:
                raise SystemExit(f"the service stopped with status {service.returncode}")
            if time.monotonic() > deadline:
                raise SystemExit("the service did not answer in time")
            while not sent.empty():
                progress.advance(task, sent.get())
            if events.exists():
                with events.open(encoding="utf-8") as file:
                    file.seek(position)
                    while (line := file.readline()).endswith("\n"):
                        position = file.tell()
                        event = json.loads(line)
                        ended += event["type"] == "stream.ended"
                        show(progress.console, event)
            time.sleep(0.05)


def show(console: Console, event: dict[str, Any]) -> None:
    """One line for an event of an action."""
    kind = event["type"]
    if not kind.startswith("action."):
        return
    label = event["label"]
    colour = PALETTE[sum(label.encode()) % len(PALETTE)]
    name = f"[{colour}]{label.replace('_', ' ').lower():<20}[/]"
    head = f"[dim]{event['time']:7.1f} s  {event['stream']}[/]"
    if kind == "action.started":
        text = f"{head}  [bold]▶[/] {name} started at {event['start']:6.1f} s"
    elif kind == "action.ended":
        span = f"{event['start']:6.1f} – {event['end']:6.1f} s"
        text = f"{head}  [bold]■[/] {name} {span}  [dim]score {event['score']:.2f}[/]"
    else:
        text = f"{head}  [bold]×[/] {name} aborted"
    console.print(text, highlight=False)


def report(console: Console, recordings: list[Path], events: Path) -> None:
    """How well it did on these recordings, at its own thresholds and over everything it would commit."""
    truth, tious = read_annotations(HERE / "annotations.json"), parse_tious("0.3:0.7:0.1")
    emitted = score(read_predictions(events), truth, "test", tious)
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder) / "everything.jsonl"
        detect_recordings(HERE / "bundle", recordings, everything, min_score=0.01)
        ranked = score(read_predictions(everything), truth, "test", tious)
    table = Table(title="against the truth", title_style="bold", show_header=False)
    table.add_row("F1 at tIoU 0.5, as emitted", f"{100 * emitted.counts.f1:.1f}")
    table.add_row("average mAP, tIoU 0.3:0.7 (--min-score 0.01)", f"{100 * ranked.average_mean_ap:.1f}")
    table.add_row("start p-mAP within 1 s (--min-score 0.01)", f"{100 * ranked.start_mean_ap[0]:.1f}")
    table.add_row("median delay of starts", f"{emitted.start_delay.p50:.2f} s")
    table.add_row("median delay of ends", f"{emitted.end_delay.p50:.2f} s")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
