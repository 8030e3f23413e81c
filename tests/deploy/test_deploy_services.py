"""systemd units and launchd plists: known keys, real command lines, hardened."""

import configparser
import getpass
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_cli import BadCommandError, parse

DEPLOY = Path(__file__).parents[2] / "deploy"
SYSTEM_UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
USER_UNITS = sorted((DEPLOY / "systemd" / "user").glob("*.service"))
PLISTS = sorted((DEPLOY / "launchd").glob("*.plist"))
ANALYZE = shutil.which("systemd-analyze")

KNOWN = {
    "Unit": {"Description", "Wants", "After"},
    "Install": {"WantedBy"},
    "Service": {
        "AmbientCapabilities", "CapabilityBoundingSet", "DynamicUser", "Environment", "ExecStart",
        "LimitNOFILE", "LockPersonality", "NoNewPrivileges", "PrivateDevices", "PrivateTmp",
        "ProtectClock", "ProtectControlGroups", "ProtectHome", "ProtectHostname",
        "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc",
        "ProtectSystem", "RemoveIPC", "Restart", "RestartSec", "RestrictAddressFamilies",
        "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "RuntimeDirectory",
        "RuntimeDirectoryMode", "StateDirectory", "StateDirectoryMode",
        "SystemCallArchitectures", "SystemCallErrorNumber", "SystemCallFilter",
        "TimeoutStopSec", "UMask", "User",
    },
}  # fmt: skip
HARDENED = {
    "NoNewPrivileges": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_NETLINK AF_UNIX",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
}
PLIST_KEYS = {
    "Label", "ProgramArguments", "RunAtLoad", "KeepAlive", "ThrottleInterval", "ExitTimeOut",
    "ProcessType", "Umask", "SoftResourceLimits",
}  # fmt: skip


def _unit(path: Path) -> configparser.ConfigParser:
    # SystemCallFilter may stand twice, so not strict; keys keep their case.
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text())
    return unit


def _command(path: Path) -> list[str]:
    """ExecStart with its specifiers filled in, without the program."""
    line = _unit(path)["Service"]["ExecStart"]
    for specifier, value in {"%h": "/home/a", "%S": "/var/lib", "%t": "/run", "%i": "a"}.items():
        line = line.replace(specifier, value)
    assert "%" not in line
    program, *arguments = shlex.split(line)
    assert program in ("/opt/kvferry/bin/kvferry", "/home/a/.local/bin/kvferry")
    return arguments


def test_there_is_a_unit_and_a_plist_for_each_service() -> None:
    assert [p.name for p in SYSTEM_UNITS] == [
        "kvferry-coordinator.service", "kvferry-node@.service", "kvferry-store.service",
    ]  # fmt: skip
    assert [p.name for p in USER_UNITS] == ["kvferry-node.service"]
    assert [p.stem for p in PLISTS] == [
        "org.kvferry.coordinator", "org.kvferry.node", "org.kvferry.store",
    ]  # fmt: skip


@pytest.mark.parametrize("path", [*SYSTEM_UNITS, *USER_UNITS], ids=lambda p: p.name)
def test_a_unit_has_known_keys_and_a_command_that_parses(path: Path) -> None:
    unit = _unit(path)
    assert set(unit.sections()) == set(KNOWN)
    for section, known in KNOWN.items():
        assert set(unit[section]) <= known, section
    service = unit["Service"]
    assert {key: service[key] for key in HARDENED} == HARDENED
    assert service["Restart"] == "on-failure"
    arguments = _command(path)
    assert path.name.startswith(f"kvferry-{arguments[0]}")
    parse(arguments)


@pytest.mark.parametrize("path", SYSTEM_UNITS, ids=lambda p: p.name)
def test_a_system_unit_owns_the_folders_that_its_command_writes(path: Path) -> None:
    service = _unit(path)["Service"]
    assert service["ProtectSystem"] == "strict"
    folders = [f"/var/lib/{service['StateDirectory'].replace('%i', 'a')}"]
    if "RuntimeDirectory" in service:
        folders.append(f"/run/{service['RuntimeDirectory'].replace('%i', 'a')}")
    written = [a.removeprefix("file://") for a in _command(path) if "/" in a]
    assert written
    for place in written:
        assert any(place == f or place.startswith(f"{f}/") for f in folders), place
    assert ("DynamicUser" in service) != ("User" in service)


def _analyze(*arguments: str, runtime: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "SYSTEMD_LOG_LEVEL": "warning"}
    return subprocess.run(
        [str(ANALYZE), *arguments],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip


def _installed(path: Path, folder: Path) -> Path:
    """The unit as it would be installed here: its program exists, its instance is a user."""
    program = Path(sys.executable).with_name("kvferry")
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", path.read_text())
    place = folder / path.name.replace("@", f"@{getpass.getuser()}")
    place.write_text(text)
    return place


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here; the parser above checks")
@pytest.mark.parametrize("path", [*SYSTEM_UNITS, *USER_UNITS], ids=lambda p: p.name)
def test_systemd_itself_finds_nothing_to_complain_about(path: Path, tmp_path: Path) -> None:
    place = _installed(path, tmp_path)
    mode = ["--user"] if path in USER_UNITS else []
    done = _analyze("verify", *mode, str(place), runtime=tmp_path)
    complaints = [line for line in done.stderr.splitlines() if place.name in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("path", SYSTEM_UNITS, ids=lambda p: p.name)
def test_a_system_unit_is_little_exposed(path: Path, tmp_path: Path) -> None:
    place = _installed(path, tmp_path)
    done = _analyze("security", "--offline=true", str(place), runtime=tmp_path)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze is too old for --offline")
    found = re.search(r"exposure level for .*: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 2.5


@pytest.mark.parametrize("path", PLISTS, ids=lambda p: p.name)
def test_a_plist_parses_and_its_command_too(path: Path) -> None:
    value = plistlib.loads(path.read_bytes())
    assert set(value) == PLIST_KEYS
    assert value["Label"] == path.stem
    assert value["KeepAlive"] == {"SuccessfulExit": False}
    assert value["Umask"] == 0o077
    assert value["ExitTimeOut"] >= 30  # more than the shutdown_timeout_s of the services
    shell, flag, script = value["ProgramArguments"]
    assert (shell, flag) == ("/bin/sh", "-c")
    assert subprocess.run(["sh", "-n", "-c", script], check=False, timeout=10).returncode == 0
    words = shlex.split(script)
    assert words[:2] == ["exec", "$HOME/.local/bin/kvferry"]
    arguments = [w for w in words[2:] if not re.match(r"[0-9]?>", w)]
    assert arguments == [path.stem.rpartition(".")[2]]
    parse(arguments)


def test_a_wrong_command_line_would_be_found() -> None:
    for arguments in (["store", "--folder", "x"], ["stroe"], ["coordinator", "extra"]):
        with pytest.raises(BadCommandError):
            parse(arguments)
