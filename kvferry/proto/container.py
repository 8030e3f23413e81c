"""The blob file: framing, checks and caps. Knows no codec; stores read headers with it.

    magic "KVFERRY\\x01" | header length u32le | BlobHeader | sections | BLAKE3 of all before

Nothing is trusted before it is checked: every size is compared with a cap and with the
bytes at hand before it is used, sections may neither overlap nor leave gaps, each has
its checksum, and the whole has its digest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from kvferry.errors import (
    BlobTooLargeError,
    CorruptBlobError,
    FerryError,
    UnsupportedVersionError,
)
from kvferry.proto.header import (
    DEFAULT_LIMITS,
    FORMAT_VERSION,
    Limits,
    check_ranges,
    check_sections,
    codec_params,
    key_of,
    parse_header,
)
from kvferry.proto.keys import DIGEST_BYTES
from kvferry.proto.v1 import blob_pb2

__all__ = [
    "DEFAULT_LIMITS",
    "FORMAT_VERSION",
    "MAGIC",
    "MAGIC_NAME",
    "PREFIX_BYTES",
    "Blob",
    "Finding",
    "Limits",
    "SectionData",
    "checksum",
    "codec_params",
    "examine",
    "header_bytes_needed",
    "key_of",
    "pack",
    "parse",
    "read_header",
    "verify_digest",
]

MAGIC_NAME = b"KVFERRY"
MAGIC = MAGIC_NAME + bytes([FORMAT_VERSION])
PREFIX_BYTES = len(MAGIC) + 4


@dataclass(frozen=True, slots=True)
class SectionData:
    """A section to be written, or one that was read and found whole."""

    name: str
    data: bytes | memoryview
    raw_length: int


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob whose every check has passed. Sections are views, not copies."""

    header: blob_pb2.BlobHeader
    sections: dict[str, SectionData]
    size: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What `examine` says about one field."""

    field: str
    ok: bool
    detail: str


def checksum(data: bytes | memoryview) -> int:
    """First 8 bytes of BLAKE3, as a little-endian number."""
    return int.from_bytes(blake3(data).digest(8), "little")


def pack(header: blob_pb2.BlobHeader, sections: Sequence[SectionData]) -> bytes:
    """Write a blob. ``header.sections`` and ``format_version`` are filled in here."""
    full = blob_pb2.BlobHeader()
    full.CopyFrom(header)
    full.format_version = FORMAT_VERSION
    del full.sections[:]
    offset = 0
    for section in sections:
        full.sections.add(
            name=section.name,
            offset=offset,
            length=len(section.data),
            raw_length=section.raw_length,
            checksum=checksum(section.data),
        )
        offset += len(section.data)
    head = full.SerializeToString(deterministic=True)
    body = b"".join([MAGIC, len(head).to_bytes(4, "little"), head, *(s.data for s in sections)])
    return body + blake3(body).digest()


def _header_length(prefix: bytes | memoryview, limits: Limits) -> int:
    if len(prefix) < PREFIX_BYTES:
        raise CorruptBlobError("length", f"{len(prefix)} bytes are no blob")
    if bytes(prefix[: len(MAGIC_NAME)]) != MAGIC_NAME:
        raise CorruptBlobError("magic", "these bytes are no kvferry blob")
    version = prefix[len(MAGIC_NAME)]
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError("blob format", version, FORMAT_VERSION)
    length = int.from_bytes(prefix[len(MAGIC) : PREFIX_BYTES], "little")
    if length > limits.max_header:
        raise BlobTooLargeError("header length", length, limits.max_header)
    return length


def header_bytes_needed(prefix: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> int:
    """How many bytes from the start hold the header; ``prefix`` has `PREFIX_BYTES`."""
    return PREFIX_BYTES + _header_length(prefix, limits)


def read_header(
    data: bytes | memoryview, size: int | None = None, limits: Limits = DEFAULT_LIMITS
) -> blob_pb2.BlobHeader:
    """Check and return the header; the payload need not be in ``data``.

    Args:
        data: at least the first `header_bytes_needed` bytes of the blob.
        size: bytes of the whole blob, where ``data`` is only its start.
    Raises:
        CorruptBlobError, BlobTooLargeError, UnsupportedVersionError.
    """
    total = len(data) if size is None else size
    if total > limits.max_blob:
        raise BlobTooLargeError("size", total, limits.max_blob)
    end = header_bytes_needed(data[:PREFIX_BYTES], limits)
    if end + DIGEST_BYTES > total or end > len(data):
        raise CorruptBlobError("header", f"needs {end:,} bytes, the blob has {total:,}")
    header = parse_header(bytes(data[PREFIX_BYTES:end]))
    check_ranges(header, limits)
    check_sections(header, total - end - DIGEST_BYTES, limits)
    return header


def verify_digest(data: bytes | memoryview) -> None:
    """Compare the digest at the end with the bytes before it. Raises: CorruptBlobError."""
    if len(data) < PREFIX_BYTES + DIGEST_BYTES:
        raise CorruptBlobError("length", f"{len(data)} bytes are no blob")
    view = memoryview(data)
    if blake3(view[:-DIGEST_BYTES]).digest() != bytes(view[-DIGEST_BYTES:]):
        raise CorruptBlobError("digest", "BLAKE3 of the blob differs from the one at its end")


def parse(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> Blob:
    """Check everything and return header and sections.

    Raises:
        CorruptBlobError, BlobTooLargeError, UnsupportedVersionError. Nothing is
        allocated beyond the header.
    """
    view = memoryview(data)
    header = read_header(view, None, limits)
    verify_digest(view)
    return Blob(header, dict(_sections(header, view, limits)), len(view))


def _sections(
    header: blob_pb2.BlobHeader, view: memoryview, limits: Limits
) -> Iterator[tuple[str, SectionData]]:
    start = header_bytes_needed(view[:PREFIX_BYTES], limits)
    for section in header.sections:
        at = start + section.offset
        data = view[at : at + section.length]
        if checksum(data) != section.checksum:
            raise CorruptBlobError(f"section {section.name!r}", "checksum differs")
        yield section.name, SectionData(section.name, data, section.raw_length)


def examine(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> list[Finding]:
    """Field by field, what holds and what does not; never raises for bad bytes."""
    findings: list[Finding] = []

    def check(field: str, run: Callable[[], object]) -> bool:
        try:
            detail = run()
        except FerryError as exc:
            findings.append(Finding(field, False, str(exc)))
            return False
        findings.append(Finding(field, True, str(detail or "ok")))
        return True

    view = memoryview(data)
    check("size", lambda: _size_within(len(view), limits))
    if not check("prefix", lambda: f"header of {_header_length(view[:PREFIX_BYTES], limits):,} B"):
        return findings
    end = header_bytes_needed(view[:PREFIX_BYTES], limits)
    headers: list[blob_pb2.BlobHeader] = []
    if end > len(view):
        findings.append(Finding("header", False, f"cut short at {len(view):,} of {end:,} bytes"))
        return findings
    if check("header", lambda: headers.append(parse_header(bytes(view[PREFIX_BYTES:end])))):
        header = headers[0]
        check("ranges", lambda: check_ranges(header, limits))
        payload = len(view) - end - DIGEST_BYTES
        if check("sections", lambda: check_sections(header, payload, limits)):
            for section in header.sections:
                at = end + section.offset
                whole = checksum(view[at : at + section.length]) == section.checksum
                detail = "checksum matches" if whole else "checksum differs"
                findings.append(Finding(f"section {section.name}", whole, detail))
    check("digest", lambda: verify_digest(view))
    return findings


def _size_within(size: int, limits: Limits) -> str:
    if size > limits.max_blob:
        raise BlobTooLargeError("size", size, limits.max_blob)
    return f"{size:,} B"
