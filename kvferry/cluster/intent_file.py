"""Operator intent in files of one coordinator: a JSON file for each document."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from kvferry.cluster.durable import write_durably
from kvferry.cluster.intent import check_name, check_size
from kvferry.cluster.namespaces import kept_salt, namespace_salt
from kvferry.errors import StoreUnavailableError


class FileIntentStore:
    """An `IntentStore` in a folder that no other process writes to.

    Files are replaced as a whole and synced, so that a version is never used twice, also
    over a crash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{check_name(name)}.json"

    async def read(self, name: str) -> bytes | None:
        """As `IntentStore`."""
        try:
            return await asyncio.to_thread(self._path(name).read_bytes)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StoreUnavailableError(self.where, f"{name} not read ({exc.strerror})") from exc

    async def write(self, name: str, data: bytes) -> bool:
        """As `IntentStore`; always True."""
        check_size(name, data)
        try:
            await asyncio.to_thread(write_durably, self._path(name), data)
        except OSError as exc:
            problem = f"{name} not written down ({exc.strerror})"
            raise StoreUnavailableError(self.where, problem) from exc
        return True

    async def set_aside(self, name: str) -> None:
        """As `IntentStore`: under the name NAME.damaged."""
        path = self._path(name)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(path.replace, path.with_suffix(".damaged"))

    async def changes(self, name: str) -> AsyncGenerator[bytes, None]:
        """As `IntentStore`: nobody else writes, so nothing ever comes."""
        await asyncio.Event().wait()
        yield b""

    async def kept_salt(self, namespace: str) -> bytes:
        """As `IntentStore`."""
        return await asyncio.to_thread(kept_salt, self.folder, check_name(namespace))

    async def salt(self, namespace: str, brought: bytes = b"") -> bytes:
        """As `IntentStore`."""
        name = check_name(namespace)
        return await asyncio.to_thread(namespace_salt, self.folder, name, brought=brought)
