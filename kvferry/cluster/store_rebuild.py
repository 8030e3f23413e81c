"""Make the index say what the files say: after a crash, a loss, or a look inside.

Only headers are read. Payloads are verified when they are next read whole, or by a scrub.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kvferry.cluster.backends.base import Area, BlobBackend, Entry
from kvferry.cluster.blob_check import checked_info
from kvferry.cluster.blob_name import fan_out, parse_blob_name
from kvferry.cluster.index import Index
from kvferry.cluster.index_units import Record
from kvferry.cluster.repository import BlobInfo
from kvferry.cluster.space import StoreLimits
from kvferry.errors import (
    BlobNotFoundError,
    CodecError,
    CorruptBlobError,
    FerryError,
    IdentityMismatchError,
    InvalidKeyError,
)
from kvferry.proto import container

_FIRST_READ = 16 * 1024
_BATCH = 200

Stamp = Callable[[float, int], int]


@dataclass(slots=True)
class Reconciled:
    """What was put right."""

    added: int = 0
    lost: int = 0
    set_aside: int = 0

    def __str__(self) -> str:
        return (
            f"{self.added} blobs added to the index, {self.lost} lost ones removed from it, "
            f"{self.set_aside} damaged ones set aside"
        )


def read_info(backend: BlobBackend, entry: Entry, area: Area, limits: StoreLimits) -> BlobInfo:
    """Header of a blob in an engine, checked. Raises: CodecError, BlobNotFoundError."""
    key, _ = parse_blob_name(entry.name)
    caps = container.Limits(max_blob=limits.max_blob_bytes)
    reader = backend.reader(entry.name, area)
    try:
        head = reader.read(0, _FIRST_READ)
        need = container.header_bytes_needed(head, caps)
        if need > len(head):
            head = reader.read(0, need)
        header = container.read_header(head, reader.size, caps)
        return checked_info(header, key, reader.size)
    finally:
        reader.close()


def _record(
    backend: BlobBackend, entry: Entry, area: Area, limits: StoreLimits, stamp: Stamp
) -> Record:
    info = read_info(backend, entry, area, limits)
    return Record(
        info=info,
        charged=backend.charge(entry.size),
        expires_s=int(entry.name.partition("@")[2] or 0),  # the name was checked with the header
        used_ns=stamp(entry.modified_unix_s, info.tokens[0]),
    )


def reconcile(
    backend: BlobBackend, index: Index, limits: StoreLimits, now_s: float, stamp: Stamp
) -> Reconciled:
    """Index what is not indexed, drop rows without a file, set damaged files aside."""
    report = Reconciled()
    fans = set(backend.fans())
    for byte in range(256):
        known = index.names_under(byte)
        entries = backend.entries("blobs", f"{byte:02x}") if f"{byte:02x}" in fans else iter(())
        new = list(_unknown(backend, entries, known, report))
        index.delete([parse_blob_name(name)[0] for name in known], now_s)
        report.lost += len(known)
        for at in range(0, len(new), _BATCH):
            _add(backend, index, new[at : at + _BATCH], limits, now_s, stamp, report)
    return report


def _unknown(
    backend: BlobBackend, entries: Iterator[Entry], known: dict[str, int], report: Reconciled
) -> Iterator[Entry]:
    """Entries that the index lacks. What stays in ``known`` has no file of its size."""
    for entry in entries:
        size = known.get(entry.name)
        if size is None:
            yield entry
        elif size == entry.size:
            del known[entry.name]
        else:
            backend.quarantine(entry.name, CorruptBlobError.reason)
            report.set_aside += 1


def _add(
    backend: BlobBackend,
    index: Index,
    entries: list[Entry],
    limits: StoreLimits,
    now_s: float,
    stamp: Stamp,
    report: Reconciled,
) -> None:
    records: dict[str, Record] = {}
    for entry in entries:
        try:
            if fan_out(entry.name) != entry.fan:
                raise InvalidKeyError(entry.name[:200], "found where it does not belong")
            records[entry.name] = _record(backend, entry, "blobs", limits, stamp)
        except (CodecError, InvalidKeyError) as exc:
            backend.quarantine(entry.name, exc.reason, entry.fan)
            report.set_aside += 1
        except BlobNotFoundError:
            continue
    try:
        index.insert(list(records.values()), now_s)
        report.added += len(records)
    except IdentityMismatchError:
        _add_singly(backend, index, records, now_s, report)


def _add_singly(
    backend: BlobBackend,
    index: Index,
    records: Mapping[str, Record],
    now_s: float,
    report: Reconciled,
) -> None:
    for name, record in records.items():
        try:
            index.insert([record], now_s)
            report.added += 1
        except IdentityMismatchError as exc:
            backend.quarantine(name, exc.reason)
            report.set_aside += 1


def staged_records(backend: BlobBackend, limits: StoreLimits) -> Iterator[tuple[Record, float]]:
    """Staged blobs that a former process left, oldest first, and since when they wait."""
    for entry in sorted(backend.entries("staged"), key=lambda e: e.modified_unix_s):
        try:
            record = _record(backend, entry, "staged", limits, lambda at, start: int(at * 1e9))
        except FerryError:
            backend.delete(entry.name, "staged")
            continue
        yield record, entry.modified_unix_s
