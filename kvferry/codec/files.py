"""Small files, written so that a reader never sees half of one."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Unique temporary name, fsync, rename, fsync of the folder. Raises: OSError.

    Read by whom the umask lets: reports and calibrations are made for others too.
    """
    temporary = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
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
