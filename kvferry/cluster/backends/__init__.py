"""Engines that hold blobs, chosen by URL."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvferry.cluster.backends.base import BlobBackend
from kvferry.cluster.backends.file import FileBackend
from kvferry.cluster.backends.memory import MemoryBackend
from kvferry.errors import ConfigError

__all__ = ["BlobBackend", "FileBackend", "MemoryBackend", "open_backend"]


def open_backend(url: str) -> BlobBackend:
    """The engine that ``url`` names; not opened yet. Raises: ConfigError."""
    scheme, _, _ = url.partition("://")
    if url == "memory://":
        return MemoryBackend()
    if scheme == "file":
        parts = urlsplit(url)
        path = Path(unquote(parts.path))
        if not parts.netloc and path.is_absolute() and len(path.parts) > 1:
            return FileBackend(path)
        raise ConfigError("backend", url, "file:///PATH with an absolute path")
    if scheme == "s3":
        raise ConfigError("backend", url, "file:///PATH here: a bucket is for `kvferry store`")
    raise ConfigError("backend", url, "file:///PATH or memory://")
