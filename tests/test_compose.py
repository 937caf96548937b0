"""deploy/compose.yaml, as far as it can be checked without Docker: commands, files, topics fit together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from engine.manifest import read_bundle
from onset import app
from stream.config import load_service_config
from stream.partition import warm_chunks

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def here(words: list[str]) -> list[str]:
    """A command with its paths as they are outside of the container."""
    return [re.sub(r"^/deploy(?=/)", str(DEPLOY), word) for word in words]


def listed(project: str, key: str) -> list[str]:
    """A list of pyproject.toml, the first of that name. (Python 3.10 has no tomllib.)"""
    found = re.search(rf"^{key} = \[(.*)\]$", project, flags=re.M)
    assert found is not None
    return re.findall(r'"([^"]+)"', found[1])


@pytest.mark.parametrize("name", ["service", "producer"])
def test_a_command_is_a_verb_of_ours_with_options_that_it_has(name: str) -> None:
    verb, *words = here(SERVICES[name]["command"])
    commands: Any = typer.main.get_command(app)
    with commands.commands[verb].make_context(verb, words) as context:
        files = [value for value in context.params.values() if isinstance(value, Path)]
        files += context.params.get("recordings", [])
    assert files
    assert all(file.is_relative_to(DEPLOY) and file.exists() for file in files)
    assert SERVICES[name]["volumes"] == [".:/deploy:ro"]


def test_everybody_means_the_same_broker_and_the_same_topics() -> None:
    config = load_service_config(DEPLOY / "compose-service.yaml")
    kafka = config.source.kafka
    assert kafka is not None
    (broker,) = kafka.connection.bootstrap
    assert f"INSIDE://{broker}" in SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    assert broker in SERVICES["kafka"]["healthcheck"]["test"]
    assert f"--to=kafka://{broker}/{kafka.topic}" in SERVICES["producer"]["command"]
    assert SERVICES["consumer"]["command"] == [broker, kafka.events]
    (script,) = SERVICES["topics"]["command"]
    assert set(re.findall(r"--bootstrap-server (\S+)", script)) == {broker}
    made = set(re.findall(r"--topic (\S+)", script))
    assert made == {kafka.topic, kafka.events, config.dead_letters.kafka_topic}
    assert (config.bundle / "bundle.json").exists()
    (program,) = here(SERVICES["consumer"]["entrypoint"])[1:]
    assert Path(program).exists()


def test_messages_are_kept_for_longer_than_they_are_read_again() -> None:
    """As stream/KAFKA.md says it: a mark is so many chunks old, at most, when the next is made."""
    config = load_service_config(DEPLOY / "compose-service.yaml")
    manifest, _ = read_bundle(config.bundle)
    warm = warm_chunks(manifest, config.max_gap)
    chunks, chunk_seconds = warm + warm // 2, manifest.chunk / manifest.frame.rate
    seconds = chunks * chunk_seconds
    said = (ROOT / "stream" / "KAFKA.md").read_text()
    assert f"{seconds:.0f} s ({chunks} chunks of {chunk_seconds:g} s)" in said
    (script,) = SERVICES["topics"]["command"]
    (kept,) = re.findall(r"retention\.ms=(\d+)", script)
    assert int(kept) / 1000 > 2 * seconds
    assert "message.timestamp.type=LogAppendTime" in script


def test_health_is_asked_where_it_is_told() -> None:
    config = load_service_config(DEPLOY / "compose-service.yaml")
    assert config.http is not None
    port = config.http.address.rpartition(":")[2]
    assert SERVICES["service"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"http://127.0.0.1:{port}/ready" in SERVICES["service"]["healthcheck"]["test"][-1]


def test_nobody_waits_for_a_service_that_is_not_there() -> None:
    for service in SERVICES.values():
        for other, condition in service.get("depends_on", {}).items():
            assert other in SERVICES
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other]


def test_the_image_holds_what_the_package_is_made_of_and_no_torch() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    copied = {
        word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, flags=re.M) for word in line.split()
    }
    modules = {f"{name}.py" for name in listed(project, "py-modules")}
    needed = {"pyproject.toml", "README.md", *listed(project, "license-files"), *modules}
    assert 'readme = "README.md"' in project
    assert copied == needed | set(listed(project, "packages"))
    assert all((ROOT / name).exists() for name in copied)
    kept = re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), flags=re.M)
    assert set(kept) == copied
    (extra,) = re.findall(r"pip install .*'\.\[(\w+)\]'", DOCKERFILE)
    assert not any("torch" in requirement for requirement in listed(project, extra))
    assert re.search(r"^USER (?!root)\S+$", DOCKERFILE, flags=re.M)
