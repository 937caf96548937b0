"""`make bench`: what Onset costs on this machine, in one run: the shipped bundle, and ActionFormer in full
context against the original.

Every figure is a ratio to a floor or a peer timed beside it, in turn: a machine that drifts hits both.
Writes bench.json and bench.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

import torch

from tests.benchmarks import offline, streaming
from tests.benchmarks.peer import NoPeerError, Peer


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench"))
    parser.add_argument(
        "--actionformer",
        metavar="CLONE",
        default=os.environ.get("ACTIONFORMER"),
        help="a clone of the original to measure against; default: the environment's ACTIONFORMER",
    )
    options = parser.parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    peer, missing = None, ""
    try:
        peer = Peer(options.actionformer)
    except NoPeerError as problem:
        missing = f"{problem}."
        sys.stderr.write(f"{missing}\n")

    rows, facts = streaming.measure()
    more, differences = offline.measure(peer)
    rows += more
    facts["machine"] = f"{platform.machine()}, {platform.python_version()}, one core"
    values = {"rows": [dataclasses.asdict(row) for row in rows], **facts, "differences": differences}
    (output / "bench.json").write_text(json.dumps(values, indent=2) + "\n")
    lines = ["| what | ms | against | ms | ratio |", "|---|---|---|---|---|", *(row.line for row in rows)]
    lines += ["", "| fact | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    lines += [f"| largest difference, {what} | {value:.1e} |" for what, value in differences.items()]
    lines += ["", missing] if missing else []
    (output / "bench.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
