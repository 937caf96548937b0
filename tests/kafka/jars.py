"""The jars that a Kafka broker runs on: those of an installation, or what Maven resolves, copied once.

Knows Maven and the cache; does not know what a broker is. The cache is outside the tree and shared by every
checkout: one folder for each version, whole once it holds the digest of the pom.xml it was made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

POM = Path(__file__).with_name("pom.xml")
COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
MAVEN_SECONDS = 240
OLDEST_JAVA = 17


@cache
def java() -> str:
    """The Java that runs brokers. Raises RuntimeError when there is none, or only an old one."""
    home = os.environ.get("JAVA_HOME")
    found = str(Path(home) / "bin" / "java") if home else "java"
    try:
        said = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=60).stderr
    except OSError as problem:
        raise RuntimeError(f"no Java: {found}: {problem.strerror}; install JDK {OLDEST_JAVA}") from None
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < OLDEST_JAVA:
        raise RuntimeError(
            f"{found} says {said.strip()!r}, expected Java {OLDEST_JAVA} or newer; set JAVA_HOME"
        )
    return found


@cache
def class_path() -> str:
    """What `java -cp` takes. Copies the jars where that was not done before, for some ten seconds.

    Raises RuntimeError when `KAFKA_HOME` holds no Kafka, or Maven is not there or resolves nothing.
    """
    if home := os.environ.get("KAFKA_HOME"):
        if not list(Path(home, "libs").glob("kafka_*.jar")):
            raise RuntimeError(
                f"KAFKA_HOME is {home}, which has no libs/kafka_*.jar; unset it, and Maven is asked"
            )
        return str(Path(home, "libs", "*"))
    root = Path(os.environ.get("ONSET_KAFKA_CACHE") or Path.home() / ".cache" / "onset" / "kafka")
    version = ElementTree.parse(POM).findtext(".//{*}kafka.version")
    assert version, f"{POM} has no property kafka.version"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: one run copies, the others wait for it
        _copy_once(root / version)
    return str(root / version / "*")


def _copy_once(folder: Path) -> None:
    digest = hashlib.sha256(POM.read_bytes()).hexdigest()
    whole = folder / "whole"
    if whole.exists() and whole.read_text() == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        "mvn",
        "-B",
        "-q",
        "-f",
        str(POM),
        COPY,
        f"-DoutputDirectory={folder}",
        "-DincludeScope=runtime",
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=MAVEN_SECONDS)
    except OSError as problem:
        raise RuntimeError(f"no Maven: mvn: {problem.strerror}; install it, or set KAFKA_HOME") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"Maven resolved no Kafka within {MAVEN_SECONDS} s; set KAFKA_HOME") from None
    if run.returncode:
        raise RuntimeError(
            f"Maven resolves no Kafka; set KAFKA_HOME, or see to it: {run.stdout[-2000:].strip()}"
        )
    whole.write_text(digest)
