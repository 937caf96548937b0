"""YAML that costs more than it weighs: refused with a sentence, before that is paid."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.schema import Strict, load_config
from engine.yaml_file import load_yaml

ROOT = Path(__file__).resolve().parents[2]

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 25))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 25))
BOMBS = {
    "digits": ("a: " + "1" * 600_000, "a number of 600000 characters"),
    "digits of a clock": ("a: 1" + ":1" * 300_000, "a number of 600001 characters"),
    "digits that say so": ("a: !!int '1" + ":1" * 300_000 + "'", "a number of 600001 characters"),
    "a float": ("a: 1." + "1" * 600_000, "a number of 600002 characters"),
    "a float of a clock": ("a: 1" + ":1" * 300_000 + ".5", "a number of 600003 characters"),
    "hexadecimal": ("a: 0x" + "f" * 600_000, "a number of 600002 characters"),
    "aliases": (LAUGHS, "more than 100000 values"),
    "merge keys": (MERGES, "a merge key"),
    "an alias of itself": ("a: &a [*a]", "nested more than 32 levels"),
    "brackets": ("[" * 500_000, "not readable as YAML"),
    "braces": ("{a: " * 200_000, "not readable as YAML"),
    "dashes": ("- " * 500_000 + "x", ""),
    "indents": ("".join(" " * n + "a:\n" for n in range(1200)), ""),
    "nesting": ("[" * 40 + "]" * 40, "nested more than 32 levels"),
    "size": ("# " + "x" * 1024 * 1024, "larger than"),
    "no text": (b"a: \xff\xfe", "UTF-8"),
    "a tag": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a date": ("a: 2024-99-99", "not readable as YAML: ValueError"),
}


class Anything(Strict):
    """A schema with one key."""

    a: int


# In a process of its own, which an overflowing stack or a lack of memory would end; half a minute of
# processor time is a hundred times what they take.
def test_no_yaml_costs_more_than_its_length(tmp_path: Path) -> None:
    for name, (content, _) in BOMBS.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code = f"""
import resource, sys
from pathlib import Path
from engine.yaml_file import load_yaml
from engine.errors import ConfigError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        load_yaml(path)
        print(path.name, "|read", flush=True)
    except ConfigError as problem:
        print(path.name, "|" + str(problem), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-1000:]
    told = dict(line.split(" |", 1) for line in done.stdout.splitlines())
    for name, (_, complaint) in BOMBS.items():
        assert complaint in told[name]
        assert told[name] != "read"
        assert len(told[name]) < 400


def test_aliases_and_numbers_of_an_ordinary_length_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x {b: 0x1f, c: 1e-3, d: 1_000, e: -.inf}\nf: *x\ng: 2024-01-01\n")
    values = load_yaml(tmp_path / "a.yaml")
    assert values["f"] == {"b": 31, "c": "1e-3", "d": 1000, "e": float("-inf")}


def test_a_device_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load_config(Anything, Path("/dev/zero"))
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(Anything, tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Anything, tmp_path / "x")


def test_a_pipe_is_read_as_a_file_is() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a: 7\n")
    os.close(writer)
    try:
        assert load_config(Anything, Path(f"/dev/fd/{reader}")).a == 7
    finally:
        os.close(reader)


def test_no_flipped_bit_ends_in_a_traceback(tmp_path: Path) -> None:
    draw = random.Random(15)
    data = (ROOT / "configs" / "service.yaml").read_bytes()
    read = 0
    for _ in range(150):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "service.yaml").write_bytes(flipped)
        with suppress(ConfigError):
            load_yaml(tmp_path / "service.yaml")
            read += 1
    assert 50 < read < 150
