"""Servers from Debian's packages for tests: installed where they are missing, never started."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REQUIRED = "KVFERRY_REQUIRE_SERVERS"
_POLICY = Path("/usr/sbin/policy-rc.d")
_LOCK = Path("/tmp/kvferry-apt.lock")


def program(name: str, *packages: str) -> str:
    """Path of a server's program, from Debian's ``packages`` (default: one of its name).

    Where it can be had neither from this machine nor from apt, the test is skipped, with
    the command that would help; it fails instead where `REQUIRED` is set, as in CI.
    """
    packages = packages or (name,)
    found = _find(name) or (_install(packages) and _find(name))
    if found:
        return found
    reason = f"{name} is missing: sudo apt install {' '.join(packages)}"
    if os.environ.get(REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _install(packages: tuple[str, ...]) -> bool:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    quiet = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    with _alone(), _no_services():
        for arguments in (["apt-get", "update", "-qq"], command):
            done = subprocess.run(arguments, env=quiet, capture_output=True, timeout=400)
    return done.returncode == 0


@contextmanager
def _alone() -> Iterator[None]:
    with _LOCK.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _no_services() -> Iterator[None]:
    """Debian's packages start what they install, on well-known ports: not here."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
