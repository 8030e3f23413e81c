"""Faults that need the machine's help: mounts, network namespaces, another clock."""

import ctypes.util
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes at ``folder``. Skips where this user may not mount."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    folder.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"mount: {exc.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        _run("umount", "--lazy", str(folder))


def fill(disk: Path) -> Path:
    """A file that takes all the room that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return filler


def without_overrides() -> list[str]:
    """A command in front of which even root obeys the modes of folders. Skips without it."""
    found = shutil.which("setpriv")
    if found is None:
        pytest.skip("setpriv (util-linux) is missing")
    if os.geteuid() != 0:
        return []
    dropped = "-dac_override,-dac_read_search,-fowner"
    return [found, f"--bounding-set={dropped}", "--inh-caps=-all"]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made or removed in ``folder``, at any depth."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = {path: path.stat().st_mode for path in folders}
    try:
        for path in folders:
            path.chmod(0o555)
        yield
    finally:
        for path, mode in modes.items():
            with suppress(FileNotFoundError):
                path.chmod(mode)


class Clock:
    """A wall clock for services, by libfaketime; `jump` moves it while they run."""

    def __init__(self, folder: Path) -> None:
        """Skips, or fails where servers are required, without libfaketime."""
        from debian_server import program

        program("faketime")
        self._library = next(
            (str(path) for path in Path("/usr/lib").rglob("libfaketimeMT.so.1")), None
        ) or ctypes.util.find_library("faketimeMT")
        if self._library is None:
            pytest.skip("libfaketimeMT.so.1 was not found")
        self._file = folder / f"clock-{uuid.uuid4().hex}"
        self.jump(0)

    @property
    def environment(self) -> dict[str, str]:
        """For services that shall have this clock; their monotonic one is real."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: int) -> None:
        """So far from the real one, from now on."""
        self._file.write_text(f"{seconds:+d}s\n")


class Wire:
    """A machine of its own as far as the network goes: a namespace behind a pair of veths."""

    def __init__(self) -> None:
        """Skips where namespaces cannot be made."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root, and ip (iproute2)")
        tag = uuid.uuid4().hex[:6]
        self.name, self._near, self._far = f"kvf{tag}", f"kvfa{tag}", f"kvfb{tag}"
        number = int(tag, 16) % 16_000
        base = f"10.{200 + number // 4000}.{number // 64 % 64 + 64}"
        self.near, self.far = f"{base}.{number % 64 * 4 + 1}", f"{base}.{number % 64 * 4 + 2}"
        try:
            _run("ip", "netns", "add", self.name)
            _run("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far)
            _run("ip", "link", "set", self._far, "netns", self.name)
            _run("ip", "addr", "add", f"{self.near}/30", "dev", self._near)
            _run("ip", "link", "set", self._near, "up")
            self._inside("ip", "addr", "add", f"{self.far}/30", "dev", self._far)
            self._inside("ip", "link", "set", self._far, "up")
            self._inside("ip", "link", "set", "lo", "up")
        except subprocess.CalledProcessError as exc:
            self.close()
            pytest.skip(f"no network namespaces here: {exc.stderr.decode().strip()}")

    def _inside(self, *command: str) -> None:
        _run("ip", "netns", "exec", self.name, *command)

    @property
    def prefix(self) -> list[str]:
        """In front of a command that shall run there."""
        return ["ip", "netns", "exec", self.name]

    def cut(self, cut: bool) -> None:
        """A partition: packets vanish in both directions, and nobody is told."""
        _run("ip", "link", "set", self._near, "down" if cut else "up")

    def slow(self, rate: str) -> bool:
        """A link of so much ("2mbit"), with the queue of one; "": as fast as it goes.

        Returns: False where the kernel has no token bucket.
        """
        with suppress(subprocess.CalledProcessError):
            _run("tc", "qdisc", "del", "dev", self._near, "root")
        if not rate:
            return True
        try:
            _run(
                *("tc", "qdisc", "add", "dev", self._near, "root"),
                *("tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"),
            )
        except (subprocess.CalledProcessError, FileNotFoundError):
            return False
        return True

    def close(self) -> None:
        """Take it all away."""
        for command in (
            ("ip", "link", "del", self._near),
            ("ip", "netns", "del", self.name),
        ):
            with suppress(subprocess.CalledProcessError):
                _run(*command)
