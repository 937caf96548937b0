"""Half an hour of abuse beside fifty polite streams: does the service stay up, small, and right?

    python -m tests.stream.abuse --seconds 1800 --seed 0

Producers that leave at full queues, floods, silent connections, half handshakes, slow readers of everything,
bundles that change, pauses, files removed, disks full, all at once; `--only NAME` runs one of them alone. It
ends with one line of counts, and with status 1 unless the events of the polite streams are those of a quiet
run, byte for byte, and the process is the one that was started, as large as it was, and ends when it is told
to. Needs Linux.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.stream.abuse.course import ABUSERS, run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.stream.abuse", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], choices=sorted(ABUSERS), metavar="NAME")
    parser.add_argument("--keep", type=Path, help="a new folder for the service's log and files")
    options = parser.parse_args()
    from tests.tiny import write_tiny_bundle

    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        bundle = write_tiny_bundle(Path(name) / "tiny")
        outcome = run(bundle, folder, options.seconds, options.seed, options.only)
        for fault in outcome.faults:
            sys.stderr.write(f"{fault}\n")
        if outcome.faults:
            sys.stderr.write((folder / "log").read_text(errors="replace")[-4000:])
        print(outcome)  # noqa: T201
    sys.exit(bool(outcome.faults))


if __name__ == "__main__":
    main()
