"""The receiving end of a get, shared by both clients: capped, exact, verified."""

import numpy as np

from kvferry.cluster import wire
from kvferry.errors import BlobTooLargeError, ProtocolError
from kvferry.proto import container
from kvferry.proto.v1 import store_pb2


class Receiver:
    """Puts the messages of one ``Get`` together into a buffer of the right size.

    The size is known from the first message, and checked, before anything is allocated.
    """

    def __init__(self, where: str, offset: int, length: int, max_bytes: int) -> None:
        """``length`` 0: to the end. ``max_bytes``: cap of what may be allocated."""
        self._where, self._offset, self._length = where, offset, length
        self._max_bytes = max_bytes
        self._buffer: memoryview | None = None
        self._at = 0
        self.blob_size = 0
        self.source = ""

    def start(self, item: wire.GetItem) -> None:
        """Take the first message. Raises: ProtocolError, BlobTooLargeError."""
        if not isinstance(item, store_pb2.GetReply) or not item.HasField("header"):
            raise ProtocolError(f"{self._where}: a get's answer must begin with its header")
        self.blob_size, self.source = item.header.size, item.header.source
        if self._offset > self.blob_size:
            raise ProtocolError(f"{self._where}: offset is beyond the blob")
        want = self.blob_size - self._offset
        if self._length:
            want = min(want, self._length)
        if want > self._max_bytes:
            raise BlobTooLargeError("size", want, self._max_bytes)
        # Not a bytearray: its zeros would cost a tenth of the transfer.
        self._buffer = np.empty(want, dtype=np.uint8).data
        self.feed(item.data)

    def feed(self, data: wire.Chunk) -> None:
        """Take the bytes that come next. Raises: ProtocolError for more than announced."""
        if self._buffer is None:
            raise ProtocolError(f"{self._where}: data before the header")
        end = self._at + len(data)
        if end > len(self._buffer):
            raise ProtocolError(f"{self._where}: more bytes than announced")
        self._buffer[self._at : end] = data
        self._at = end

    def take(self, item: wire.GetItem) -> None:
        """Take any message. Raises: ProtocolError, BlobTooLargeError."""
        if self._buffer is None:
            self.start(item)
        else:
            self.feed(data_of(self._where, item))

    @property
    def received(self) -> int:
        """Bytes that are here."""
        return self._at

    @property
    def whole(self) -> bool:
        """Whether the range is the whole blob, so that its digest can be checked."""
        return self._offset == 0 and self._buffer is not None and self._at == self.blob_size

    def finish(self, verify: bool) -> memoryview:
        """The bytes. Raises: ProtocolError (fewer than announced), CorruptBlobError."""
        if self._buffer is None or self._at != len(self._buffer):
            raise ProtocolError(f"{self._where}: fewer bytes than announced")
        if verify and self.whole:
            container.verify_digest(self._buffer)
        return self._buffer.toreadonly()


def data_of(where: str, item: wire.GetItem) -> wire.Chunk:
    """The bytes of a message after the first. Raises: ProtocolError."""
    if isinstance(item, memoryview):
        return item
    if isinstance(item, wire.Malformed):
        raise ProtocolError(f"{where}: {item.problem}")
    return item.data
