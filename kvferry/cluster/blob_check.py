"""What every store checks of a blob while its bytes pass: header, key, length, digest.

Pure and blocking; an object of these is used by one thread at a time.
"""

from blake3 import blake3

from kvferry.cluster.convert import info_from_header
from kvferry.cluster.repository import BlobInfo, PutSpec
from kvferry.errors import BlobTooLargeError, CorruptBlobError, IdentityMismatchError
from kvferry.proto import container
from kvferry.proto.keys import DIGEST_BYTES, BlobKey
from kvferry.proto.v1 import blob_pb2

MAX_PARAMS_BYTES = 16 * 1024

Chunk = bytes | memoryview


def checked_info(header: blob_pb2.BlobHeader, key: BlobKey, size: int) -> BlobInfo:
    """What the index keeps of a header, if it is the header of ``key``.

    Raises: IdentityMismatchError, BlobTooLargeError.
    """
    found = container.key_of(header)
    if found != key:
        raise IdentityMismatchError("key", str(found), str(key))
    if len(header.codec.params_json) > MAX_PARAMS_BYTES:
        raise BlobTooLargeError("params_json", len(header.codec.params_json), MAX_PARAMS_BYTES)
    return info_from_header(header, key, size)


class RunningDigest:
    """BLAKE3 over all of a blob but its last 32 bytes, which say what it must be."""

    def __init__(self, size: int) -> None:
        """``size``: bytes of the whole blob."""
        self._hasher = blake3()
        self._left = max(0, size - DIGEST_BYTES)
        self._said = b""

    def update(self, data: Chunk) -> None:
        """The next bytes, in order."""
        view = memoryview(data)
        hashed = min(len(view), self._left)
        self._hasher.update(view[:hashed])
        self._left -= hashed
        self._said += bytes(view[hashed:])

    def check(self) -> None:
        """After the last byte. Raises: CorruptBlobError."""
        if self._left or self._hasher.digest() != self._said:
            raise CorruptBlobError("digest", "BLAKE3 of the blob differs from the one at its end")


class PutCheck:
    """A blob on its way in: its header is judged as soon as it is here, its digest at the end.

    Attributes:
        info: what the header says; None until it is here.
    """

    def __init__(self, spec: PutSpec, max_blob_bytes: int) -> None:
        self._key, self._size, self._rule = spec.key, spec.size, spec.rule
        self._limits = container.Limits(max_blob=max_blob_bytes)
        self._early = bytearray()
        self._digest = RunningDigest(spec.size)
        self._taken = 0
        self.info: BlobInfo | None = None

    def take(self, chunk: Chunk) -> memoryview | None:
        """The bytes that may now be written; None while the header is not whole.

        Raises: CorruptBlobError, IdentityMismatchError, BlobTooLargeError,
        WrongNamespaceError.
        """
        if self.info is None:
            self._early += chunk
            self.info = self._header()
            if self.info is None:
                return None
            chunk = bytes(self._early)
            self._early.clear()
        data = memoryview(chunk)
        self._digest.update(data)
        self._taken += len(data)
        return data

    def _header(self) -> BlobInfo | None:
        early, size = self._early, self._size
        if len(early) < container.PREFIX_BYTES:
            return None
        need = container.header_bytes_needed(bytes(early[: container.PREFIX_BYTES]), self._limits)
        if need > size:
            raise CorruptBlobError("header", f"needs {need:,} bytes, the blob has {size:,}")
        if len(early) < need:
            return None
        header = container.read_header(bytes(early), size, self._limits)
        info = checked_info(header, self._key, size)
        if self._rule is not None:
            self._rule.check(info.namespace_tag)
        return info

    def finish(self) -> BlobInfo:
        """After the last byte. Raises: CorruptBlobError."""
        if self.info is None or self._taken != self._size:
            got = self._taken + len(self._early)
            raise CorruptBlobError("length", f"{got:,} bytes came of {self._size:,}")
        self._digest.check()
        return self.info
