"""What was offered once: where only what comes back is to be stored, the first time is noted.

Two filters, of which the older is forgotten when the newer is full: bounded, and a restart
costs nothing but reading a small file. One in a few hundred is taken for known at first.
"""

import asyncio
import logging
from pathlib import Path

from blake3 import blake3

from kvferry.cluster.durable import write_durably
from kvferry.node.bloom import Bloom
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

MAGIC = b"KVFSEEN\x01"
FILTER_BYTES = 64 * 1024
SAVE_S = 60.0
_HASHES = 8
_COUNT_BYTES = 4
_DIGEST_BYTES = 32


def _item(key: BlobKey) -> bytes:
    """The tokens and the part of the model, however they are coded."""
    return blake3(f"{key.kind}/{key.page_key.hex()}/{key.layers}/{key.heads}".encode()).digest(16)


class SecondUse:
    """Belongs to the event loop, but for `load` and the writing, which block.

    Args:
        filter_bytes: of each of the two filters; a file with others is left aside.
    """

    def __init__(self, path: Path, filter_bytes: int = FILTER_BYTES) -> None:
        self._path, self._bytes = path, filter_bytes
        self._young, self._old = self._empty(), self._empty()
        self._count = 0
        self._changed = False
        self.load()

    def load(self) -> None:
        """Read what the last run knew; a file that is not whole is left aside."""
        try:
            with self._path.open("rb") as file:
                data = file.read(2 * self._bytes + 256)
        except OSError:
            return
        body, told = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        at = len(MAGIC) + _COUNT_BYTES
        whole = len(body) == at + 2 * self._bytes and blake3(body).digest() == told
        if not whole or not body.startswith(MAGIC):
            log.warning("%s is damaged: what was offered once is not known", self._path)
            return
        self._count = int.from_bytes(body[len(MAGIC) : at], "little")
        self._young = Bloom(body[at : at + self._bytes], _HASHES)
        self._old = Bloom(body[at + self._bytes :], _HASHES)

    def seen(self, key: BlobKey) -> bool:
        """Whether its tokens were offered before."""
        item = _item(key)
        return item in self._young or item in self._old

    def note(self, key: BlobKey) -> None:
        """They are offered now."""
        item = _item(key)
        if item in self._young:
            return
        if self._count >= self._young.capacity:
            self._old, self._young, self._count = self._young, self._empty(), 0
        self._young.add(item)
        self._count += 1
        self._changed = True

    def _content(self) -> bytes:
        count = self._count.to_bytes(_COUNT_BYTES, "little")
        body = b"".join((MAGIC, count, self._young.bits, self._old.bits))
        return body + blake3(body).digest()

    async def save(self) -> None:
        """Write the file, if there is news. A disk that refuses is logged only."""
        if not self._changed:
            return
        self._changed = False
        try:
            await asyncio.to_thread(write_durably, self._path, self._content())
        except OSError as exc:
            log.warning("%s: %s", self._path, exc)

    async def run(self) -> None:
        """Save now and then, for ever."""
        while True:
            await asyncio.sleep(SAVE_S)
            await self.save()

    def _empty(self) -> Bloom:
        return Bloom(bytes(self._bytes), _HASHES)
