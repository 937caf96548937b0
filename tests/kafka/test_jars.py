"""Where a broker's jars come from, and what is said where they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kafka import jars


def test_an_installation_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka_2.13-4.1.2.jar").touch()
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    assert jars.class_path.__wrapped__() == str(tmp_path / "libs" / "*")


def test_a_home_without_a_kafka_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="KAFKA_HOME"):
        jars.class_path.__wrapped__()


def test_without_java_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="no Java"):
        jars.java.__wrapped__()


def test_a_copy_that_was_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maven = tmp_path / "bin" / "mvn"
    maven.parent.mkdir()
    maven.write_text(
        "#!/bin/sh\nfor each; do case $each in -DoutputDirectory=*) to=${each#*=};; esac; done\n"
    )
    with maven.open("a") as script:
        script.write('mkdir -p "$to" && echo >"$to/a.jar" && echo copied >>"$(dirname "$0")/runs"\n')
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", f"{maven.parent}:/usr/bin:/bin")
    monkeypatch.setenv("ONSET_KAFKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    folder = Path(jars.class_path.__wrapped__()).parent
    jars.class_path.__wrapped__()
    assert (maven.parent / "runs").read_text() == "copied\n"
    (folder / "whole").unlink()
    (folder / "half.jar").touch()
    jars.class_path.__wrapped__()
    assert (maven.parent / "runs").read_text() == "copied\ncopied\n"
    assert not (folder / "half.jar").exists()
