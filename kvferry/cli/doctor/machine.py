"""Memory, folders, budgets, sockets, calibrations: is there room, and may we write there?"""

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryFile

import psutil

from kvferry.cli.doctor.finding import FAIL, OK, WARN, Finding, size
from kvferry.errors import FerryError
from kvferry.places import config_file, user_dir
from kvferry.settings import (
    GIB,
    CoordinatorSettings,
    NodeSettings,
    ServiceSettings,
    StoreSettings,
    is_loopback,
)

# Unix sockets' paths have at most so many bytes.
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_LITTLE_MEMORY = 2 * GIB
_FILE = "file://"


def settings() -> Iterator[Finding]:
    """The configuration of every service can be read."""
    path = config_file()
    yield Finding("settings", OK, f"from {path}" if path else "no file; defaults and environment")
    kinds: Sequence[type[ServiceSettings]] = (NodeSettings, StoreSettings, CoordinatorSettings)
    for kind in kinds:
        try:
            kind.load()
        except FerryError as exc:
            yield Finding("settings", FAIL, str(exc), f"mend [{kind.table}] or its variable")


def memory(node: NodeSettings) -> Iterator[Finding]:
    """Room for the node's memory tier beside a model."""
    found = psutil.virtual_memory()
    text = f"{size(found.available)} of {size(found.total)} free"
    if node.memory_bytes > found.total // 2:
        remedy = "lower node.memory_bytes"
        yield Finding(
            "memory", WARN, f"{text}, and the node may take {size(node.memory_bytes)}", remedy
        )
    elif found.available < _LITTLE_MEMORY:
        yield Finding("memory", WARN, text, "close other programs, or use a smaller model")
    else:
        yield Finding("memory", OK, text)


def folders(node: NodeSettings, store: StoreSettings) -> Iterator[Finding]:
    """Where the services of this machine write: allowed, private, and with room."""
    yield from _folder("node's folder", node.data_dir, node.disk_bytes, node.disk_reserve_bytes)
    if is_loopback(node.store) and store.backend.startswith(_FILE):
        path = Path(store.backend.removeprefix(_FILE))
        yield from _folder("store's folder", path, store.budget_bytes, store.reserve_bytes)
    yield from _folder("cache folder", user_dir("cache"), 0, 0, private=False)


def _folder(
    name: str, path: Path, budget: int, reserve: int, *, private: bool = True
) -> Iterator[Finding]:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not _writable(there):
        remedy = f"let this user ({os.getuid()}) write there, or set another folder"
        yield Finding(name, FAIL, f"{path} cannot be written to", remedy)
        return
    if private and there == path and path.stat().st_mode & 0o077:
        yield Finding(name, WARN, f"{path} can be read by others", f"chmod 700 {path}")
    free = disk_usage(there).free
    held = _held(path) if budget else 0
    room = held + free - reserve
    text = f"{path}: {size(free)} free"
    if free < reserve:
        what = f"{text}, less than the reserve of {size(reserve)}: nothing is stored any more"
        yield Finding(name, FAIL, what, "free some disk, or lower the reserve")
    elif budget > room:
        what = f"{text}; the budget of {size(budget)} would need {size(budget - room)} more"
        yield Finding(name, WARN, what, "it fills what there is above the reserve, and no more")
    else:
        yield Finding(name, OK, text + (f", budget {size(budget)}" if budget else ""))


def _writable(folder: Path) -> bool:
    """Tried: permissions do not tell of read-only disks."""
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _held(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        with suppress(OSError):  # a store at work deletes and renames
            total += file.stat().st_size if file.is_file() else 0
    return total


def socket(node: NodeSettings) -> Iterator[Finding]:
    """The node's socket is this user's alone."""
    path = node.socket
    length = len(os.fsencode(path))
    if length > _SOCKET_BYTES:
        what = f"{path} is {length} bytes long, more than the {_SOCKET_BYTES} of a socket"
        yield Finding("socket", FAIL, what, "set node.socket to a shorter path")
        return
    try:
        about = path.lstat()
    except FileNotFoundError:
        return  # the node's own check says that it does not run
    if not stat.S_ISSOCK(about.st_mode):
        yield Finding("socket", FAIL, f"{path} is no socket", "remove it, or set node.socket")
    elif about.st_uid != os.getuid():
        remedy = "run hooks as the user that runs the node"
        yield Finding("socket", FAIL, f"{path} belongs to user {about.st_uid}", remedy)
    elif about.st_mode & 0o077:
        yield Finding("socket", WARN, f"others may use {path}", f"chmod 600 {path}")
    else:
        yield Finding("socket", OK, f"{path}, for this user only")


def calibrations() -> Iterator[Finding]:
    """Models that have a calibration on this machine."""
    from kvferry.codec.calibration import CalibrationSet
    from kvferry.codec.calibration_set import SET_FILE

    folder = user_dir("cache") / "calibrations"
    found, broken = [], []
    for path in sorted(folder.glob(f"*/{SET_FILE}")):
        try:
            found.append(CalibrationSet.load(path.parent)[0].model_id.hex()[:16])
        except FerryError as exc:
            broken.append(path.parent)
            yield Finding(
                "calibrations",
                WARN,
                f"{path.parent}: {exc}",
                f"rm -r {path.parent}, then calibrate",
            )
    if found:
        yield Finding("calibrations", OK, f"of {', '.join(found)}")
    elif not broken:
        yield Finding(
            "calibrations",
            WARN,
            f"none in {folder}: pages take 8 bits a value till one is made from live traffic",
            "kvferry calibrate --model M",
        )
