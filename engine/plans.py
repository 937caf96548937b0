"""The cache of TensorRT plans beside a bundle, in its folder `plans/`: what is kept for which machine.

A plan runs on the TensorRT that built it, on a GPU of its kind, and nowhere else. So each file says at its
head what it is for and what its bytes hash to, and TensorRT, which would trust them, is given nothing that
was cut short or meant for another machine. The same holds of timing caches, what earlier builds measured. A
hash is no signature: who can write the bundle's folder is trusted.

Reading never fails: what cannot be read counts as not there, with a warning. Knows nothing of TensorRT
itself. Deleting the folder costs the time of building anew, no more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "plans"
MAX_PLAN_BYTES = 8 * 1024**3
_PLAN, _TIMING = b"onset plan 1\n", b"onset timing 1\n"
_MAX_HEAD_BYTES = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanKey:
    """What a plan is for. `graph`: sha256 of the bundle's graph; `architecture`: as `sm_90`; `device`: the
    name of the GPU, since tactics that were timed on an H100 are not those of an H200."""

    graph: str
    tensorrt: str
    architecture: str
    device: str
    precision: str
    batch: int

    @property
    def machine(self) -> str:
        """The part that is of the machine alone, for a file's name."""
        device = re.sub(r"[^A-Za-z0-9]+", "-", self.device).strip("-")[:64]
        return f"trt{self.tensorrt}-{self.architecture}-{device}"

    @property
    def file(self) -> str:
        """The plan's file in the cache."""
        return f"{self.graph[:12]}-{self.machine}-{self.precision}-b{self.batch}.plan"

    @property
    def timing_file(self) -> str:
        """The file in the cache of what builds on such a machine measured."""
        return f"{self.machine}.timing"


class PlanCache:
    """Plans and timing caches of one bundle."""

    def __init__(self, bundle: Path) -> None:
        self.folder = bundle / FOLDER

    def files(self) -> set[str]:
        """Names of the plans that are there, whatever they are for."""
        try:
            return {name for name in os.listdir(self.folder) if name.endswith(".plan")}
        except OSError as problem:
            if not isinstance(problem, FileNotFoundError):
                log.warning("%s: cannot be read: %s", self.folder, problem.strerror)
            return set()

    def read(self, key: PlanKey) -> bytes | None:
        """The plan, or None. A damaged, foreign or unreadable file counts as none, with a warning."""
        return self._read(key.file, _PLAN, asdict(key), "a new plan takes its place")

    def write(self, key: PlanKey, plan: bytes) -> Path:
        """Keep a plan; returns its file. Raises OSError where the folder cannot be written."""
        return self._write(key.file, _PLAN, asdict(key), plan)

    def timing(self, key: PlanKey) -> bytes:
        """What earlier builds on such a machine measured; empty at first, and, with a warning, where the file
        is damaged, foreign or unreadable."""
        return self._read(key.timing_file, _TIMING, _machine(key), "tactics are timed anew") or b""

    def keep_timing(self, key: PlanKey, timing: bytes) -> None:
        """For the next build. Raises OSError where the folder cannot be written."""
        self._write(key.timing_file, _TIMING, _machine(key), timing)

    def _read(self, name: str, magic: bytes, expected: dict[str, object], instead: str) -> bytes | None:
        path = self.folder / name
        try:
            problem, content = _checked(path, magic, expected)
        except FileNotFoundError:
            return None
        except (OSError, MemoryError) as refused:
            problem, content = f"cannot be read: {refused or 'there is no memory for it'}", None
        if problem:
            log.warning("%s: %s; %s", path, problem, instead)
        return content

    def _write(self, name: str, magic: bytes, facts: dict[str, object], content: bytes) -> Path:
        """All or nothing: two services may build the same plan at once."""
        head = facts | {"sha256": hashlib.sha256(content).hexdigest()}
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        draft = path.with_name(f".{name}.{os.getpid()}")
        try:
            draft.write_bytes(magic + json.dumps(head).encode() + b"\n" + content)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return path


def _machine(key: PlanKey) -> dict[str, object]:
    return {"tensorrt": key.tensorrt, "architecture": key.architecture, "device": key.device}


def _checked(path: Path, magic: bytes, expected: dict[str, object]) -> tuple[str | None, bytes | None]:
    """What is wrong with a file, as a sentence, or else its content. Raises OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file", None
    if found.st_size > MAX_PLAN_BYTES:
        return f"larger than {MAX_PLAN_BYTES} bytes", None
    with path.open("rb") as file:
        if file.readline(len(magic)) != magic:
            return "not a file of this Onset", None
        try:
            head = json.loads(file.readline(_MAX_HEAD_BYTES))
        except (ValueError, RecursionError):
            return "its head is damaged", None
        content = file.read()
    if head != expected | {"sha256": hashlib.sha256(content).hexdigest()}:
        return "damaged, or of another bundle or machine", None
    return None, content
