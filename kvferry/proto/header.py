"""What a blob's header may say: ranges, identities, section table, codec parameters.

Nothing here looks beyond the header; `kvferry.proto.container` frames the bytes.
"""

import json
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvferry.errors import (
    BlobTooLargeError,
    CorruptBlobError,
    InvalidKeyError,
    UnsupportedVersionError,
)
from kvferry.proto.keys import (
    DIGEST_BYTES,
    MAX_HEADS,
    MAX_LAYERS,
    BlobKey,
    codec_id,
    kind_name,
)
from kvferry.proto.v1 import blob_pb2

FORMAT_VERSION = 1
MIB = 1 << 20
MAX_POSITION = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps that hold before anything is allocated. Sizes in bytes."""

    max_blob: int = 256 * MIB
    max_header: int = 256 * 1024
    max_sections: int = 2048
    max_streams: int = 64
    max_raw: int = 1024 * MIB


DEFAULT_LIMITS = Limits()


def parse_header(raw: bytes) -> blob_pb2.BlobHeader:
    try:
        header = blob_pb2.BlobHeader.FromString(raw)
    except DecodeError as exc:
        raise CorruptBlobError("header", "not a BlobHeader message") from exc
    if header.format_version != FORMAT_VERSION:
        raise UnsupportedVersionError("blob header", header.format_version, FORMAT_VERSION)
    return header


def check_ranges(header: blob_pb2.BlobHeader, limits: Limits) -> None:
    whole = header.kind != blob_pb2.BLOB_KIND_CALIBRATION
    for field, value, needed in (
        ("model_id", header.model_id, True),
        ("page_key", header.page_key, True),
        ("previous_key", header.previous_key, whole),
        ("calibration_id", header.codec.calibration_id, False),
        ("rope_fingerprint", header.rope_fingerprint, False),
    ):
        if len(value) != DIGEST_BYTES and (needed or value):
            raise CorruptBlobError(field, f"has {len(value)} bytes, {DIGEST_BYTES} wanted")
    try:
        key_of(header)
    except InvalidKeyError as exc:
        raise CorruptBlobError("key", exc.problem) from exc
    if len(header.streams) > limits.max_streams:
        raise BlobTooLargeError("streams", len(header.streams), limits.max_streams)
    if not whole:
        return
    if not header.token_start < header.token_end <= MAX_POSITION:
        raise CorruptBlobError("tokens", f"{header.token_start}-{header.token_end} is no range")
    if header.model_layers > MAX_LAYERS or header.model_heads > MAX_HEADS:
        raise CorruptBlobError("model", "has more layers or heads than any")
    if header.layer_end > header.model_layers or header.head_end > header.model_heads:
        raise CorruptBlobError("ranges", "reach beyond the model's layers or heads")


def check_sections(header: blob_pb2.BlobHeader, payload: int, limits: Limits) -> None:
    if len(header.sections) > limits.max_sections:
        raise BlobTooLargeError("sections", len(header.sections), limits.max_sections)
    expected = 0
    raw_total = 0
    names: set[str] = set()
    for section in header.sections:
        if section.name in names:
            raise CorruptBlobError("sections", f"{section.name!r} stands twice")
        names.add(section.name)
        if section.offset != expected:
            raise CorruptBlobError(
                f"section {section.name!r}",
                f"starts at {section.offset:,}, {expected:,} wanted (gap or overlap)",
            )
        expected += section.length
        raw_total += section.raw_length
        if expected > payload:
            raise CorruptBlobError(
                f"section {section.name!r}", f"ends at {expected:,} of {payload:,} bytes"
            )
        if raw_total > limits.max_raw:
            raise BlobTooLargeError("raw length", raw_total, limits.max_raw)
    if expected != payload:
        raise CorruptBlobError("sections", f"cover {expected:,} of {payload:,} bytes")


def key_of(header: blob_pb2.BlobHeader) -> BlobKey:
    """The key under which a blob with this header is stored. Raises: InvalidKeyError."""
    kind = kind_name(header.kind)
    if kind == "calibration":
        return BlobKey(kind, header.page_key)
    codec = header.codec
    try:
        name = codec_id(codec.name, codec.version, _params(codec.params_json), codec.calibration_id)
    except ValueError as exc:
        raise InvalidKeyError(kind, "codec parameters are no plain JSON object") from exc
    return BlobKey(
        kind,
        header.page_key,
        (header.layer_start, header.layer_end),
        (header.head_start, header.head_end),
        name,
    )


def codec_params(header: blob_pb2.BlobHeader) -> dict[str, object]:
    """The codec's parameters. Raises: CorruptBlobError."""
    try:
        return _params(header.codec.params_json)
    except ValueError as exc:
        raise CorruptBlobError("codec parameters", "are no JSON object") from exc


def _params(text: str) -> dict[str, object]:
    try:
        value = json.loads(text or "{}", parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not allowed")
