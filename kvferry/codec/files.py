"""Small files, written so that a reader never sees half of one."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Unique temporary name, fsync, rename, fsync of the folder. Raises: OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:16]}.", suffix=".part", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_capped(path: Path, cap: int) -> bytes:
    """The whole file. Raises: OSError, also for one longer than ``cap`` bytes."""
    with path.open("rb") as file:
        data = file.read(cap + 1)
    if len(data) > cap:
        raise OSError(f"{path} is longer than {cap:,} bytes")
    return data
