"""What non-maximum suppression costs: OnsetNMS on a GPU and its oracle, against the official code on a CPU.

    python -m tests.benchmarks.nms --actionformer CLONE --output tests/benchmarks/results

All are given the same 5000 candidates of 97 classes, soft, of which 2000 are kept, and what they keep is
compared before anything is timed. The kernel is timed from its inputs on the GPU to its outputs there (as
inside of a plan), and with both moved, as evaluation has them. Without a GPU it is left out, which is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.native import trusted
from engine.nms_reference import Kept, keep
from tests.benchmarks.pairs import Row, Work, paired
from tests.benchmarks.peer import NoPeerError, Peer
from tests.engine.nms_library import Case, Library, offline_case
from tests.gpu import driver

CLASSES, NUMBER = 97, 5000
LIBRARY = os.environ.get("ONSET_NMS_LIBRARY")  # the path of what `make plugin` builds


def official(peer: Peer, case: Case) -> Work:
    """The official code on the case's candidates, which it is given as a list."""
    moment, label = np.nonzero(case.scores[0])
    segments = torch.from_numpy(np.ascontiguousarray(case.offsets[0][moment]))
    scores, labels = torch.from_numpy(case.scores[0][moment, label].copy()), torch.from_numpy(label)

    def run() -> Any:
        return peer.suppress(
            segments,
            scores,
            labels,
            iou_threshold=0.1,
            min_score=case.settings.min_score,
            max_seg_num=case.settings.max_segments,
            multiclass=True,
            sigma=case.settings.sigma,
            voting_thresh=0.0,
        )

    return run


def kernel(path: Path, case: Case) -> tuple[Work, Work, Kept]:
    """The kernel on what lies on the GPU; with its inputs and outputs moved; and what it kept."""
    gpu = driver.Gpu()
    library = Library(trusted(path), "onset_nms_launch")
    arena = library.arena(case)
    tensors, workspace = arena.tensors(gpu.upload(arena.bytes))

    def launch() -> None:
        if status := library.call(case, tensors, workspace, gpu.stream):
            raise SystemExit(f"the kernel refuses the case: {status}")

    def there() -> None:
        launch()
        gpu.wait()

    def moved() -> Any:
        gpu.upload(arena.bytes)
        launch()
        return gpu.download(arena.bytes)

    return there, moved, arena.read(moved())


def difference(found: Kept, theirs: list[Any]) -> float:
    """The largest, of segments and scores: in order of their scores, of which some may be equal."""
    segments, scores, _ = (np.asarray(part) for part in theirs)
    number = int(found.number[0])
    if number != len(scores):
        raise SystemExit(f"{number} segments kept, {len(scores)} by the official code")
    mine = np.column_stack([found.segments[0, :number], found.scores[0, :number]])
    other = np.column_stack([segments, scores])
    order = [np.lexsort(np.round(values, 3).T) for values in (mine, other)]
    return float(np.abs(mine[order[0]] - other[order[1]]).max())


def main() -> None:
    """Measure, and write to --output/nms-MACHINE-DATE.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--actionformer", default=os.environ.get("ACTIONFORMER"), metavar="CLONE")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = offline_case(0, NUMBER, CLASSES)
    oracle = keep(*case[:3], case.settings)
    try:
        peer = Peer(options.actionformer)
    except NoPeerError as problem:
        sys.stderr.write(f"nothing measured: {problem}\n")
        return
    theirs = official(peer, case)
    differ = {"oracle": difference(oracle, list(theirs()))}  # type: ignore[call-overload]
    what = f"the official code, {NUMBER} candidates, {CLASSES} classes, best {case.settings.max_segments}"
    rows: list[Row] = [paired(what, theirs, "OnsetNMS's oracle", lambda: keep(*case[:3], case.settings), 30)]
    machine = platform.machine()
    if not driver.is_there():
        sys.stderr.write("without the kernel: there is no GPU here\n")
    elif LIBRARY is None:
        sys.stderr.write("without the kernel: ONSET_NMS_LIBRARY names none; make plugin\n")
    else:
        there, moved, kept = kernel(Path(LIBRARY), case)
        differ["kernel"] = difference(kept, list(theirs()))  # type: ignore[call-overload]
        machine = driver.name().replace(" ", "-")
        rows.append(paired(what, theirs, "OnsetNMS's kernel", there, 30))
        rows.append(paired(what, theirs, "OnsetNMS's kernel, inputs and outputs moved", moved, 30))
    for row in rows:
        sys.stdout.write(f"{row.line}\n")
    sys.stdout.write(f"largest differences: {differ}\n")
    if options.output:
        today = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        options.output.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {
            "machine": machine,
            "date": today,
            "differences": differ,
            "unit": "milliseconds",
        }
        values |= {"rows": [dataclasses.asdict(row) for row in rows]}
        path = options.output / f"nms-{machine}-{today[:10]}.json"
        path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
