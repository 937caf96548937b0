"""The cache of TensorRT plans beside a bundle, in its folder `plans/`: what is kept for which machine.

A plan runs on the TensorRT that built it, on a GPU of its architecture, and nowhere else. So each file says
at its head what it is for and what its bytes hash to, and TensorRT, which would trust them, is given nothing
that was cut short or meant for another machine. A hash is no signature: who can write the bundle's folder is
trusted. Knows nothing of TensorRT itself. Deleting the folder costs the time of building anew, no more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "plans"
MAX_PLAN_BYTES = 8 * 1024**3
_MAGIC = b"onset plan 1\n"
_MAX_HEAD_BYTES = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanKey:
    """What a plan is for. `graph`: sha256 of the bundle's graph; `architecture`: as `sm_90`."""

    graph: str
    tensorrt: str
    architecture: str
    precision: str
    batch: int

    @property
    def machine(self) -> str:
        """The part that is of the machine alone, for a file's name."""
        return f"trt{self.tensorrt}-{self.architecture}"

    @property
    def file(self) -> str:
        """The plan's file in the cache."""
        return f"{self.graph[:12]}-{self.machine}-{self.precision}-b{self.batch}.plan"


class PlanCache:
    """Plans and timing caches of one bundle."""

    def __init__(self, bundle: Path) -> None:
        self.folder = bundle / FOLDER

    def read(self, key: PlanKey) -> bytes | None:
        """The plan, or None. A damaged or foreign file counts as none, with a warning."""
        path = self.folder / key.file
        if not path.is_file():
            return None
        problem, plan = _checked(path, asdict(key))
        if problem:
            log.warning("%s: %s; a new plan takes its place", path, problem)
        return plan

    def write(self, key: PlanKey, plan: bytes) -> Path:
        """Keep a plan; returns its file. Raises OSError where the folder cannot be written."""
        head = asdict(key) | {"sha256": hashlib.sha256(plan).hexdigest()}
        path = self.folder / key.file
        _write(path, _MAGIC + json.dumps(head).encode() + b"\n" + plan)
        return path

    def timing(self, key: PlanKey) -> bytes:
        """What earlier builds on such a machine measured; empty at first, and where it cannot be read."""
        try:
            path = self.folder / f"{key.machine}.timing"
            return path.read_bytes() if path.stat().st_size <= MAX_PLAN_BYTES else b""
        except OSError:
            return b""

    def keep_timing(self, key: PlanKey, timing: bytes) -> None:
        """For the next build. Raises OSError where the folder cannot be written."""
        _write(self.folder / f"{key.machine}.timing", timing)


def _checked(path: Path, expected: dict[str, object]) -> tuple[str | None, bytes | None]:
    """What is wrong with a plan's file, as a sentence, or else the plan."""
    if path.stat().st_size > MAX_PLAN_BYTES:
        return f"larger than {MAX_PLAN_BYTES} bytes", None
    with path.open("rb") as file:
        if file.readline(len(_MAGIC)) != _MAGIC:
            return "not a plan of this Onset", None
        try:
            head = json.loads(file.readline(_MAX_HEAD_BYTES))
        except (ValueError, RecursionError):
            return "its head is damaged", None
        plan = file.read()
    if head != expected | {"sha256": hashlib.sha256(plan).hexdigest()}:
        return "damaged, or of another bundle or machine", None
    return None, plan


def _write(path: Path, content: bytes) -> None:
    """All or nothing: two services may build the same plan at once."""
    path.parent.mkdir(exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
