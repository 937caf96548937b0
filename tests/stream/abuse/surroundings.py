"""What happens around a service: bundles that change, signals, pauses, files and disks, its readers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

from engine.manifest import MANIFEST
from tests.stream.abuse.abuser import Abuser
from tests.stream.abuse.service import IDLE_TIMEOUT

_GRAPH = "model.onnx"
# How long it stands still: also longer than a stream may be silent, but shorter than `/live` allows.
_PAUSES = IDLE_TIMEOUT + 1.5, 0.5, 2.0


class _Around(Abuser):
    """Acts at a slow pace."""

    def pause(self) -> float:
        return self.rng.uniform(0.5, 1.5) * self.every


class Hangups(_Around):
    """The bundle is to be read anew, though it is what it was."""

    name = "hangups"

    def act(self) -> None:
        self.service.process.send_signal(signal.SIGHUP)


class Bundles(_Around):
    """The bundle's files change: copies that are the same, and some that cannot be used, for a while."""

    name = "bundles"

    def __init__(self, *values: object) -> None:
        super().__init__(*values)  # type: ignore[arg-type]
        self._bundle = self.service.bundle
        self._whole = self._bundle.with_name("whole")
        if not self._whole.exists():
            shutil.copytree(self._bundle, self._whole)

    def act(self) -> None:
        self.rng.choice(_CHANGES)(self)
        self.stop.wait(self.rng.uniform(0.0, 3.0))
        self.undo()

    def undo(self) -> None:
        """The same as in the beginning, in new files, the manifest last."""
        for name in sorted(os.listdir(self._whole), key=lambda name: name == MANIFEST):
            self._replace(name, (self._whole / name).read_bytes())

    def touched(self) -> None:
        os.utime(self._bundle / MANIFEST)

    def copied(self) -> None:
        self.undo()

    def without_manifest(self) -> None:
        (self._bundle / MANIFEST).unlink()

    def without_graph(self) -> None:
        (self._bundle / _GRAPH).unlink()
        self.touched()

    def manifest_first(self) -> None:
        graph = (self._whole / _GRAPH).read_bytes()
        (self._bundle / _GRAPH).write_bytes(b"")
        self.touched()
        with (self._bundle / _GRAPH).open("wb") as file:
            for at in range(0, len(graph), len(graph) // 20 + 1):
                file.write(graph[at : at + len(graph) // 20 + 1])
                file.flush()
                self.stop.wait(0.1)

    def cut_short(self) -> None:
        graph = (self._whole / _GRAPH).read_bytes()
        self._replace(_GRAPH, graph[: self.rng.randrange(len(graph))])
        self.touched()

    def unreadable(self) -> None:
        name = self.rng.choice((MANIFEST, _GRAPH))
        (self._bundle / name).unlink()
        (self._bundle / name).symlink_to(name)
        if name == _GRAPH:
            self.touched()

    def folder_in_its_place(self) -> None:
        (self._bundle / _GRAPH).unlink()
        (self._bundle / _GRAPH).mkdir()
        self.touched()

    def manifest_that_is_none(self) -> None:
        text = (self._whole / MANIFEST).read_text()
        values = json.loads(text) | {"graph_sha256": "0" * 64}
        self._replace(
            MANIFEST, self.rng.choice((b"", b"[]", text[:300].encode(), json.dumps(values).encode()))
        )

    def _replace(self, name: str, data: bytes) -> None:
        path: Path = self._bundle / name
        if path.is_dir():
            path.rmdir()
        partial = path.with_name(f".{name}")
        partial.write_bytes(data)
        partial.replace(path)


_CHANGES = (
    Bundles.touched,
    Bundles.copied,
    Bundles.without_manifest,
    Bundles.without_graph,
    Bundles.manifest_first,
    Bundles.cut_short,
    Bundles.unreadable,
    Bundles.folder_in_its_place,
    Bundles.manifest_that_is_none,
)


class Pauses(_Around):
    """The whole process stands still, as under a debugger, or when a machine is suspended."""

    name = "pauses"

    def pause(self) -> float:
        return 2.0 * super().pause()

    def act(self) -> None:
        self.service.pause(_PAUSES[self.count % len(_PAUSES)])


class Deaf(_Around):
    """Nobody reads its standard output, for a while."""

    name = "deaf"

    def pause(self) -> float:
        return 2.0 * super().pause()

    def act(self) -> None:
        self.service.reads.clear()
        self.stop.wait(_PAUSES[self.count % len(_PAUSES)])
        self.service.reads.set()

    def undo(self) -> None:
        self.service.reads.set()


class Files(_Around):
    """The files that it writes are moved, or removed. What the events' file held is kept aside."""

    name = "files"

    def act(self) -> None:
        service = self.service
        piece = service.events.with_name(f"{service.events.name}.{len(service.pieces())}")
        if not service.events.exists():
            pass  # moved, and not opened again: it goes on writing there
        elif self.rng.random() < 0.5:
            service.events.rename(piece)
        else:
            os.link(service.events, piece)
            service.events.unlink()
        if self.rng.random() < 0.3:
            service.letters.unlink(missing_ok=True)


class Disk(_Around):
    """The disk is full, and free again: for the second file of events, and for dead letters."""

    name = "disk"

    def act(self) -> None:
        self.service.fill_disk(True)
        self.stop.wait(self.rng.uniform(0.5, 1.0) * self.every)
        self.service.fill_disk(False)

    def undo(self) -> None:
        if self.service.is_up:
            self.service.fill_disk(False)


SURROUNDINGS: tuple[type[Abuser], ...] = (Hangups, Bundles, Pauses, Deaf, Files, Disk)
