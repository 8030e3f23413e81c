"""Blobs as files: unique temporary name, fsync, rename, fsync of the folder.

    ROOT/LOCK                 held while a process uses the root
    ROOT/index.sqlite         rebuilt from the files when it is lost
    ROOT/blobs/ab/NAME        ab: first byte of the page key
    ROOT/staged/NAME          put, not committed
    ROOT/tmp/...              being written; removed at start
    ROOT/quarantine/NAME~REASON~N
    ROOT/commit-*.json        commits under way, finished at start

Folders and files are made for their owner only: what is cached can be read back.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from kvferry.cluster.backends.base import Area, BlobReader, BlobWriter, Entry
from kvferry.cluster.blob_name import fan_out
from kvferry.errors import BlobNotFoundError, ConfigError, StoreFullError, StoreUnavailableError

_BLOCK = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _disk_errors(root: Path, need: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise StoreFullError(str(root), need, 0) from exc
        raise StoreUnavailableError(str(root), f"{exc.strerror} ({exc.filename})") from exc


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _FileWriter:
    def __init__(self, backend: "FileBackend", path: Path) -> None:
        self._backend, self._path = backend, path
        self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        if self._handle is None:
            raise StoreUnavailableError(str(self._path), "written to after its end")
        with _disk_errors(self._backend.root, len(data)):
            view = memoryview(data)
            while view:
                view = view[os.write(self._handle, view) :]

    def seal(self) -> None:
        if self._handle is None:
            return
        with _disk_errors(self._backend.root):
            os.fsync(self._handle)
        self._close()

    def publish(self, area: Area, name: str) -> None:
        target = self._backend.path(area, name)
        with _disk_errors(self._backend.root):
            self._backend.make_folder(target.parent)
            self._path.replace(target)
            _sync_folder(target.parent)

    def discard(self) -> None:
        self._close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):
                os.close(handle)


class _FileReader:
    def __init__(self, root: Path, path: Path) -> None:
        self._root = root
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> memoryview:
        buffer = np.empty(max(0, min(length, self._size - offset)), dtype=np.uint8).data
        done = 0
        with _disk_errors(self._root):
            while done < len(buffer):
                got = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
                if not got:
                    break
                done += got
        return buffer[:done].toreadonly()

    def close(self) -> None:
        self._file.close()


class FileBackend:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock_handle: int | None = None
        self._folders: set[Path] = set()

    @property
    def url(self) -> str:
        """As the setting has it."""
        return f"file://{self.root}"

    @property
    def index_path(self) -> str:
        """Beside the blobs."""
        return str(self.root / "index.sqlite")

    def path(self, area: Area, name: str) -> Path:
        """Path of a name; names are those of `kvferry.cluster.blob_name`."""
        if "/" in name or name.startswith("."):
            raise StoreUnavailableError(str(self.root), f"{name!r} is no name of a blob")
        return self._folder(area, fan_out(name)) / name

    def _folder(self, area: Area, fan: str = "") -> Path:
        return self.root / "blobs" / fan if area == "blobs" else self.root / area

    def make_folder(self, folder: Path) -> None:
        """Make a folder, durably, once."""
        if folder in self._folders:
            return
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(folder.parent)
        self._folders.add(folder)

    def open(self) -> None:
        """Lock the root, remove what dead writers left, finish commits under way."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.root / "LOCK", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise ConfigError(
                "backend", self.url, f"a folder to write to ({exc.strerror})"
            ) from exc
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(handle)
            raise ConfigError(
                "backend", self.url, "a folder that no other running kvferry process uses"
            ) from exc
        self._lock_handle = handle
        with _disk_errors(self.root):
            for name in ("blobs", "staged", "tmp", "quarantine"):
                self.make_folder(self.root / name)
            for folder in (self.root / "blobs").iterdir():
                self._folders.add(folder)
            for path in (self.root / "tmp").iterdir():
                path.unlink(missing_ok=True)
            for journal in sorted(self.root.glob("commit-*.json")):
                self._replay(journal)

    def close(self) -> None:
        """Unlock the root."""
        handle, self._lock_handle = self._lock_handle, None
        if handle is not None:
            os.close(handle)

    def create(self) -> BlobWriter:
        """Begin a file in ``tmp``."""
        with _disk_errors(self.root):
            return _FileWriter(self, self.root / "tmp" / f"{os.getpid()}-{secrets.token_hex(12)}")

    def reader(self, name: str, area: Area = "blobs") -> BlobReader:
        """Raises: BlobNotFoundError."""
        try:
            return _FileReader(self.root, self.path(area, name))
        except FileNotFoundError as exc:
            raise BlobNotFoundError(name) from exc
        except OSError as exc:
            raise StoreUnavailableError(str(self.root), str(exc)) from exc

    def commit(self, names: Sequence[str]) -> None:
        """A journal first: from then on the commit holds, whatever happens."""
        for name in names:
            if not self.path("staged", name).exists():
                raise BlobNotFoundError(name)
        journal = self.root / f"commit-{secrets.token_hex(12)}.json"
        draft = self.root / "tmp" / journal.name
        with _disk_errors(self.root):
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(handle, json.dumps(list(names)).encode())
                os.fsync(handle)
            finally:
                os.close(handle)
            draft.replace(journal)
            _sync_folder(self.root)
            self._replay(journal)

    def _replay(self, journal: Path) -> None:
        try:
            names = [str(name) for name in json.loads(journal.read_text())]
        except (ValueError, TypeError):
            names = []  # not ours: a journal is renamed into place when it is whole
        folders = set()
        for name in names:
            target = self.path("blobs", name)
            self.make_folder(target.parent)
            with suppress(FileNotFoundError):
                self.path("staged", name).replace(target)
                folders.add(target.parent)
        for folder in folders:
            _sync_folder(folder)
        journal.unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> None:
        """Both lie in one folder, as the fan-out does not depend on the expiry."""
        target = self.path("blobs", new)
        try:
            self.path("blobs", old).replace(target)
        except FileNotFoundError as exc:
            raise BlobNotFoundError(old) from exc
        with _disk_errors(self.root):
            _sync_folder(target.parent)

    def delete(self, name: str, area: Area = "blobs") -> bool:
        """False: it was not there."""
        with _disk_errors(self.root):
            try:
                self.path(area, name).unlink()
            except FileNotFoundError:
                return False
        return True

    def quarantine(self, name: str, reason: str, fan: str = "") -> bool:
        """False: it was not there."""
        target = self.root / "quarantine" / f"{name[:180]}~{reason}~{secrets.token_hex(4)}"
        with _disk_errors(self.root):
            try:
                (self._folder("blobs", fan or fan_out(name)) / name).replace(target)
            except FileNotFoundError:
                return False
        return True

    def fans(self) -> Sequence[str]:
        """Folders under ``blobs``."""
        with _disk_errors(self.root):
            return sorted(entry.name for entry in os.scandir(self.root / "blobs") if entry.is_dir())

    def entries(self, area: Area, fan: str = "") -> Iterator[Entry]:
        """Regular files of one folder."""
        with _disk_errors(self.root), os.scandir(self._folder(area, fan)) as found:
            for entry in found:
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    yield Entry(entry.name, stat.st_size, stat.st_mtime, fan)

    def charge(self, size: int) -> int:
        """Whole blocks."""
        return -(-size // _BLOCK) * _BLOCK

    def overhead_bytes(self) -> int:
        """The index with its log, and the folders."""
        total = _BLOCK * (len(self._folders) + 2)
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                total += self.charge(os.stat(self.index_path + suffix).st_size)  # noqa: PTH116
        return total

    def free_bytes(self) -> int | None:
        """Free bytes of the file system."""
        with _disk_errors(self.root):
            return shutil.disk_usage(self.root).free
