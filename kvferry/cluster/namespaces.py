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


def namespace_salt(data_dir: Path, namespace: str = DEFAULT_NAMESPACE) -> bytes:
    """The salt of a namespace, 32 bytes; made at the first call and the same ever after.

    Raises: ConfigError where the file is damaged or cannot be read or written.
    """
    path = private_folder(data_dir / "namespaces") / f"{namespace}.salt"
    try:
        if not path.exists():
            write_durably(path, secrets.token_bytes(SALT_BYTES), 0o600)
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
