"""The service that is abused: `onset run` as a process, and all that is seen of it from outside."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.kafka.flow import DECODING, ROOT

# What the polite streams need, and places for those of the abusers.
MAX_STREAMS = 80
IDLE_TIMEOUT = 6.0
STALLED_AFTER = 30.0
MAX_MESSAGE_BYTES = 2**20
# A file may not grow beyond this while the disk is "full"; two files are so large from the beginning.
FULL_BYTES = 2**26
_DESCRIPTORS = 4096
_PIPE_BYTES = 4096


@dataclass
class Seen:
    """What `/live` said, and what the process took."""

    unwell: list[str] = field(default_factory=list)  # answers other than 200
    silent: float = 0.0  # seconds, at most, between two answers; its own pauses do not count
    rss: list[int] = field(default_factory=list)  # bytes, once a second

    def growth(self) -> tuple[int, int]:
        """Bytes of memory after the first fifth of the time, and at its end; medians, for they are noisy."""
        fifth = max(1, len(self.rss) // 5)
        return round(median(self.rss[fifth : 2 * fifth] or self.rss)), round(median(self.rss[-fifth:]))


class Service:
    """One process, from its start until `stop`; a context manager that leaves nothing behind."""

    def __init__(self, folder: Path, bundle: Path, broker: str) -> None:
        """`folder` takes its files; `broker` is the HOST:PORT of one that does not answer."""
        self.folder, self.bundle = folder, bundle
        self.events, self.second, self.letters = (
            folder / name for name in ("events.jsonl", "second.jsonl", "letters.jsonl")
        )
        for path in (self.second, self.letters):
            with path.open("wb") as file:
                file.truncate(FULL_BYTES - 2**16)
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
        self._log = folder / "log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "onset", "run", str(self._config(broker))],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            )
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
        self.seen = Seen()
        self.reads = threading.Event()
        """standard output is read while this is set"""
        self.reads.set()
        self._paused, self._paused_at, self._over = 0.0, 0.0, threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._read, self._watch)]
        self._threads[0].start()
        try:
            self.address = self._said(r"ready: listening on tcp://(\S+) for")
            self.http = self._said(r"metrics at http://(\S+)")
        except BaseException:
            self.__exit__()
            raise
        self._threads[1].start()

    def _config(self, broker: str) -> Path:
        kafka = {
            "connection": {"bootstrap": broker},
            "topic": "events",
            "spool": "spool.db",
            "spool_bytes": 2**21,
            "when_full": "drop-oldest",
        }
        zmq = {
            "endpoint": "pull+bind:tcp://127.0.0.1:*",
            "max_message_bytes": MAX_MESSAGE_BYTES,
            "high_water_mark": 32,
            "heartbeat": 1.0,
            "heartbeat_timeout": 10.0,
        }
        values = {
            "bundle": str(self.bundle),
            "source": {"zmq": zmq},
            "sinks": [{"file": "events.jsonl"}, {"stdout": True}, {"file": "second.jsonl"}, {"kafka": kafka}],
            "dead_letters": {"file": "letters.jsonl", "max_bytes": 2**40, "per_second": 2},
            "http": {"address": "127.0.0.1:0", "stalled_after": STALLED_AFTER},
            "max_streams": MAX_STREAMS,
            "idle_timeout": IDLE_TIMEOUT,
            "reorder": 0.2,
            "max_gap": 0.4,
            "queue_bytes": 2**23,
            "threads": 1,
            "decoding": DECODING,
        }
        path = self.folder / "service.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    @property
    def is_up(self) -> bool:
        """It runs, and has since the start: nobody would start it again."""
        return self.process.poll() is None

    def place(self) -> tuple[str, int]:
        """Host and port of its ZeroMQ socket."""
        host, _, port = self.address.rpartition(":")
        return host, int(port)

    def http_place(self) -> tuple[str, int]:
        """Host and port of health and metrics."""
        host, _, port = self.http.rpartition(":")
        return host, int(port)

    def connect(self, place: tuple[str, int] | None = None, seconds: float = 2.0) -> socket.socket:
        """A plain TCP connection, to the ZeroMQ socket if nothing else is said."""
        return socket.create_connection(place or self.place(), timeout=seconds)

    def log(self) -> str:
        """What it wrote on standard error."""
        return self._log.read_text(errors="replace")

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def pause(self, seconds: float) -> None:
        """It stands still; for itself, that is as if the clock had been moved."""
        self._paused_at = time.monotonic()
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)
        self._paused, self._paused_at = self._paused + time.monotonic() - self._paused_at, 0.0

    def fill_disk(self, is_full: bool) -> None:
        """Files of `FULL_BYTES` cannot grow, or can again."""
        _, most = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (FULL_BYTES if is_full else most, most))

    def counted(self) -> Counter[str]:
        """Messages by what became of them: `taken`, or refused for a reason. Raises OSError."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "onset_messages_total":
                    found["taken"] = round(sample.value)
                elif sample.name == "onset_refused_total":
                    found[sample.labels["reason"]] = round(sample.value)
        return found

    def terminate(self) -> None:
        """SIGTERM; what `/live` says from here on is not looked at."""
        self._over.set()
        self.process.send_signal(signal.SIGTERM)

    def await_end(self, seconds: float) -> bool:
        """Whether it ends within so long; where it does not, its log then says what it was doing."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return True
        self.process.send_signal(signal.SIGABRT)
        self.process.wait(10)
        return False

    def pieces(self) -> list[Path]:
        """What was its file of events before, and was moved: NAME.0, NAME.1, ..."""
        return sorted(self.folder.glob("events.jsonl.*"), key=lambda path: int(path.suffix[1:]))

    def told(self) -> dict[str, list[bytes]]:
        """The events in its file and in its pieces, by stream."""
        found: dict[str, list[bytes]] = {}
        known: set[int] = set()
        for path in (*self.pieces(), self.events):
            try:
                inode, data = path.stat().st_ino, path.read_bytes()
            except FileNotFoundError:  # moved just now: it is among the pieces, then, in the next look
                continue
            if inode in known:
                continue
            known.add(inode)
            for line in data.splitlines(keepends=True):
                if line.endswith(b"\n"):  # else it is being written
                    found.setdefault(json.loads(line)["stream"], []).append(line)
        return found

    def _read(self) -> None:
        """Take events from its standard output, which holds few of them."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, 1031, _PIPE_BYTES)  # F_SETPIPE_SZ
        while True:
            self.reads.wait()
            if not os.read(pipe, 4096):
                return

    def _clock(self) -> float:
        """Seconds that it was not paused."""
        now = time.monotonic()
        return now - self._paused - (now - self._paused_at if self._paused_at else 0.0)

    def _watch(self) -> None:
        """Ask `/live`, and how large it is, once a second."""
        page = os.sysconf("SC_PAGE_SIZE")
        last = self._clock()
        while self.is_up and not self._over.is_set():
            try:
                with urllib.request.urlopen(f"http://{self.http}/live", timeout=5):
                    pass
                last = self._clock()
            except urllib.error.HTTPError as problem:
                self.seen.unwell.append(f"{problem.code}: {problem.read()[:200]!r}")
                last = self._clock()
            except OSError:
                pass  # paused, or its place was given to a newer connection
            self.seen.silent = max(self.seen.silent, self._clock() - last)
            with contextlib.suppress(OSError, IndexError):
                pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
                self.seen.rss.append(pages * page)
            self._over.wait(1.0)

    def _said(self, pattern: str, seconds: float = 60.0) -> str:
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.log())) is None:
            assert self.is_up, self.log()
            assert time.monotonic() < deadline, f"not ready: {self.log()}"
            time.sleep(0.05)
        return match[1]

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_up:
            self.process.kill()
        self.process.wait()
        self._over.set()
        self.reads.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def silent_broker() -> Iterator[str]:
    """HOST:PORT of something that lets a Kafka client connect, and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
