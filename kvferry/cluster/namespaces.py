"""Salts of namespaces: secrets that the cluster issues and keeps (design section 4).

Losing a salt orphans all that was stored under it, so a damaged one is never replaced
silently.
"""

import logging
import secrets
from pathlib import Path

from kvferry.cluster.durable import private_folder, write_durably
from kvferry.errors import ConfigError

log = logging.getLogger(__name__)

SALT_BYTES = 32
DEFAULT_NAMESPACE = "default"


def kept_salt(data_dir: Path, namespace: str = DEFAULT_NAMESPACE) -> bytes:
    """The salt of a namespace, 32 bytes; empty where none was made yet.

    Raises: ConfigError where the file is damaged or cannot be read.
    """
    path = _path(data_dir, namespace)
    try:
        if not path.exists():
            return b""
        if path.stat().st_mode & 0o077:
            log.warning("%s could be read by others: now by its owner only", path)
            path.chmod(0o600)
        salt = path.read_bytes()
    except OSError as exc:
        raise ConfigError("data_dir", str(path), f"readable and writable ({exc})") from exc
    if len(salt) != SALT_BYTES:
        raise ConfigError(
            "namespace salt",
            str(path),
            f"{SALT_BYTES} bytes: restore it from a backup, or "
            "delete it and lose all that was stored under it",
        )
    return salt


def namespace_salt(
    data_dir: Path, namespace: str = DEFAULT_NAMESPACE, *, brought: bytes = b""
) -> bytes:
    """The salt of a namespace, 32 bytes; settled at the first call and the same ever after.

    Args:
        brought: what a node was issued before. It holds where nothing is kept here, so that
            what is stored is found although this folder was lost.
    Raises: ConfigError where the file is damaged or cannot be read or written.
    """
    salt = kept_salt(data_dir, namespace)
    if salt:
        return salt
    salt = brought if len(brought) == SALT_BYTES else secrets.token_bytes(SALT_BYTES)
    path = _path(data_dir, namespace)
    try:
        write_durably(path, salt, 0o600)
    except OSError as exc:
        raise ConfigError("data_dir", str(path), f"readable and writable ({exc})") from exc
    return salt


def _path(data_dir: Path, namespace: str) -> Path:
    return private_folder(data_dir / "namespaces") / f"{namespace}.salt"
