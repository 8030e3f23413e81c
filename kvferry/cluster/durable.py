"""Small files that survive a crash: all of the old content or all of the new."""

import contextlib
import os
import tempfile
from pathlib import Path

from kvferry.errors import ConfigError


def write_durably(path: Path, data: bytes | memoryview, mode: int = 0o600) -> None:
    """Write under a temporary name, fsync, rename, fsync the folder.

    Raises: OSError; the old file is then as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner can read. Raises: ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        allowed = f"a folder that can be made ({exc.strerror})"
        raise ConfigError("data_dir", str(path), allowed) from exc
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError("data_dir", str(path), "a folder that this user can write to")
    return path
