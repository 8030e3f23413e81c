"""Read everything again and compare it with its own digests."""

from collections.abc import Sequence

from blake3 import blake3

from kvferry.cluster.backends.base import BlobReader, Entry
from kvferry.cluster.index_rows import Held
from kvferry.cluster.store_core import StoreCore
from kvferry.cluster.store_get import READ_BYTES
from kvferry.cluster.store_rebuild import read_info
from kvferry.errors import BlobNotFoundError, CodecError, CorruptBlobError
from kvferry.proto.keys import DIGEST_BYTES


def _verify(reader: BlobReader) -> None:
    hasher, at, end = blake3(), 0, reader.size - DIGEST_BYTES
    while at < end:
        piece = reader.read(at, min(READ_BYTES, end - at))
        if not piece:
            raise CorruptBlobError("length", "the file ends before the blob does")
        hasher.update(piece)
        at += len(piece)
    if hasher.digest() != bytes(reader.read(end, DIGEST_BYTES)):
        raise CorruptBlobError("digest", "BLAKE3 of the blob differs from the one at its end")


def scrub_some(core: StoreCore, held: Sequence[Held], repair: bool) -> list[tuple[str, str]]:
    """(key, reason) of those that are damaged; with ``repair`` they are set aside. Blocks."""
    findings: list[tuple[str, str]] = []
    for blob in held:
        key = blob.info.key
        try:
            reader, now = core.reader(key)
            try:
                _verify(reader)
            finally:
                reader.close()
            read_info(core.backend, Entry(now.name, reader.size), "blobs", core.limits)
        except BlobNotFoundError:
            continue  # evicted or deleted since it was listed
        except CodecError as exc:
            findings.append((str(key), exc.reason))
            core.counters["scrub_found"] += 1
            if repair:
                core.set_aside(key, exc.reason)
    return findings
