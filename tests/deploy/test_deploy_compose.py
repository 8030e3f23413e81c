"""The Compose file and its Dockerfile, read as strictly as can be without Docker."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_cli import parse

from kvferry.settings import (
    CoordinatorSettings,
    NodeSettings,
    ServiceSettings,
    StoreSettings,
    is_loopback,
)

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
SERVICES: dict[str, type[ServiceSettings]] = {
    "store": StoreSettings, "coordinator": CoordinatorSettings, "node": NodeSettings,
}  # fmt: skip
KEYS = {
    "image", "build", "restart", "init", "read_only", "tmpfs", "cap_drop", "security_opt",
    "pids_limit", "stop_grace_period", "command", "environment", "volumes", "ports",
    "healthcheck", "depends_on", "hostname", "user",
}  # fmt: skip
INSTRUCTIONS = {
    "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD", "EXPOSE", "VOLUME",
}  # fmt: skip


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((COMPOSE / "compose.yaml").read_text()))


def _value(text: str) -> str:
    """A value with ``${NAME:-default}`` at its default."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


def test_services_have_known_keys_and_are_locked_down(compose: dict[str, Any]) -> None:
    assert set(compose) <= {"name", "services", "volumes", "x-service"}
    assert set(compose["services"]) == set(SERVICES)
    for service in compose["services"].values():
        assert set(service) <= KEYS
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"kvferry:\d+\.\d+\.\d+", service["image"])
        build = service["build"]
        assert (COMPOSE / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()


@pytest.mark.parametrize("name", SERVICES)
def test_commands_and_settings_are_real(
    compose: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, kind = compose["services"][name], SERVICES[name]
    assert service["command"][0] == name
    parse(service["command"])
    prefix = kind.model_config["env_prefix"]
    for variable, value in service["environment"].items():
        assert variable.startswith(prefix)
        assert variable.removeprefix(prefix).lower() in kind.model_fields, variable
        monkeypatch.setenv(variable, _value(str(value)))
    settings = kind.load()
    assert settings.allow_remote_plaintext  # said on purpose: it listens beyond loopback
    listen = str(settings.listen)  # type: ignore[attr-defined]
    assert not is_loopback(listen)
    published = {port.rpartition(":")[2] for port in service["ports"]}
    metrics = str(settings.metrics_listen)  # type: ignore[attr-defined]
    assert published == {listen.rpartition(":")[2], metrics.rpartition(":")[2]}


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for port in service["ports"]:
            host, outside, inside = port.split(":")
            assert host == "127.0.0.1"
            assert outside == inside


def test_health_checks_ask_the_service_itself(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        first, *command = service["healthcheck"]["test"]
        assert (first, command[0]) == ("CMD", "kvferry")
        address = str(parse(command[1:])["address"])
        own = service["environment"][f"KVFERRY_{name.upper()}_LISTEN"]
        assert address.rpartition(":")[2] == own.rpartition(":")[2]
        assert address.rpartition(":")[0] in ("127.0.0.1", own.rpartition(":")[0])


def test_services_find_each_other_by_name(compose: dict[str, Any]) -> None:
    services = compose["services"]
    node = services["node"]
    for setting in ("STORE", "COORDINATOR"):
        host, _, port = node["environment"][f"KVFERRY_NODE_{setting}"].rpartition(":")
        listen = services[host]["environment"][f"KVFERRY_{setting}_LISTEN"]
        assert listen.endswith(f":{port}")
    assert node["hostname"] == node["environment"]["KVFERRY_NODE_LISTEN"].partition(":")[0]
    assert {name: d["condition"] for name, d in node["depends_on"].items()} == {
        "store": "service_healthy", "coordinator": "service_healthy",
    }  # fmt: skip


def test_volumes_exist_and_cover_what_is_written(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        targets = {}
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            targets[target] = source
            if not source.startswith("."):
                assert source in compose["volumes"]
            elif mode == ["ro"]:
                assert (COMPOSE / source).exists()
        assert "/var/lib/kvferry" in targets
        if name == "node":
            assert "/run/kvferry" in targets
        for argument in service["command"]:
            if argument.startswith("/etc/kvferry/"):
                inside = argument.removeprefix("/etc/kvferry/")
                assert (COMPOSE / targets["/etc/kvferry"] / inside).is_file()


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def test_the_dockerfile_builds_from_what_is_here_and_runs_as_nobody_special() -> None:
    found = list(_instructions((COMPOSE / "Dockerfile").read_text()))
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    ignored = (COMPOSE / "Dockerfile.dockerignore").read_text().split()
    users, stages = [], set()
    for word, rest in found:
        if word == "FROM":
            image, *alias = rest.split()
            assert re.fullmatch(r"python:3\.1[1-3]-slim", image)  # a tag, and not "latest"
            stages |= set(alias[1:])
            users = []
        elif word == "COPY":
            flags = [a for a in shlex.split(rest) if a.startswith("--")]
            sources = [a for a in shlex.split(rest) if not a.startswith("--")][:-1]
            if flags:
                assert flags[0].removeprefix("--from=") in stages
                continue
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, f"{source} does not reach the build"
        elif word == "RUN":
            assert "pip install" not in rest or "--no-cache-dir" in rest
            assert "sudo" not in rest
        elif word == "USER":
            users.append(rest)
    assert users, "the last stage must not run as root"
    assert users[-1].partition(":")[0] not in ("0", "root")
    assert ("ENTRYPOINT", '["kvferry"]') in found


def test_the_image_keeps_state_where_the_volumes_are() -> None:
    text = (COMPOSE / "Dockerfile").read_text()
    assert "XDG_STATE_HOME=/var/lib " in text
    assert "XDG_RUNTIME_DIR=/run\n" in text


def test_package_files_named_in_pyproject_reach_the_image() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ignored = (COMPOSE / "Dockerfile.dockerignore").read_text().split()
    for name in (project["readme"], *project["license-files"]):
        assert f"!{name}" in ignored
