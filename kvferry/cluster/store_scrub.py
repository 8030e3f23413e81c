"""Read everything again and compare it with its own digests."""

from collections.abc import Iterator, Sequence

from blake3 import blake3

from kvferry.cluster.backends.base import BlobReader, Entry
from kvferry.cluster.index_rows import Held
from kvferry.cluster.store_core import StoreCore
from kvferry.cluster.store_get import READ_BYTES
from kvferry.cluster.store_rebuild import read_info
from kvferry.errors import BlobNotFoundError, CodecError, CorruptBlobError
from kvferry.proto.keys import DIGEST_BYTES

# So many at once that a scrub is not all waiting, so few that it can go slowly.
BATCH_BLOBS = 32
BATCH_BYTES = 8 << 20


def batches(held: Sequence[Held]) -> Iterator[Sequence[Held]]:
    """Blobs to be checked in one go, in order."""
    batch: list[Held] = []
    size = 0
    for blob in held:
        if batch and (len(batch) == BATCH_BLOBS or size + blob.info.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(blob)
        size += blob.info.size
    if batch:
        yield batch


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


def begin_scrub(core: StoreCore) -> int:
    """Number of a new scrub. Blocks."""
    return core.index.ask(lambda index: index.begin_scrub())


def unchecked(core: StoreCore, scrub: int) -> Sequence[Held]:
    """Some of what a scrub has not read yet; none: it is done. Blocks."""
    return core.index.ask(lambda index: index.unchecked(scrub))


def scrub_some(
    core: StoreCore, held: Sequence[Held], repair: bool, scrub: int
) -> list[tuple[str, str]]:
    """(key, reason) of those that are damaged; with ``repair`` they are set aside. Blocks."""
    findings: list[tuple[str, str]] = []
    for blob in held:
        key = blob.info.key
        try:
            reader, now = core.reader(key, upkeep=True)
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
    core.index.ask(lambda index: index.note_checked(held, scrub))
    core.counters["scrubbed"] += len(held)
    core.counters["scrubbed_bytes"] += sum(blob.info.size for blob in held)
    return findings
