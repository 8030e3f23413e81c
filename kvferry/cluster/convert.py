"""Messages of store.proto to our dataclasses and back; what comes in is checked here."""

from collections.abc import Sequence

from kvferry.cluster.repository import BlobInfo, CodecInfo, ListQuery, PutSpec
from kvferry.errors import BlobTooLargeError, ProtocolError
from kvferry.proto.keys import (
    DIGEST_BYTES,
    BlobKey,
    kind_name,
    kind_number,
)
from kvferry.proto.v1 import blob_pb2, store_pb2

MAX_KEYS = 4096
MAX_TTL_S = 10 * 365 * 86_400
MAX_LEASE_S = 30 * 86_400


def keys_from_proto(messages: Sequence[blob_pb2.BlobKey]) -> list[BlobKey]:
    """Raises: ProtocolError (too many), InvalidKeyError."""
    if len(messages) > MAX_KEYS:
        raise ProtocolError(f"{len(messages):,} keys in one call, at most {MAX_KEYS:,} are taken")
    return [BlobKey.from_proto(m) for m in messages]


def digest(field: str, value: bytes, optional: bool = False) -> bytes:
    """``value``, if it is a digest, or none where that is allowed. Raises: ProtocolError."""
    if len(value) == DIGEST_BYTES or (optional and not value):
        return value
    raise ProtocolError(f"{field} has {len(value)} bytes, {DIGEST_BYTES} wanted")


def spec_to_proto(spec: PutSpec) -> store_pb2.PutHeader:
    """What opens a put."""
    return store_pb2.PutHeader(
        key=spec.key.to_proto(),
        size=spec.size,
        stage=spec.stage,
        ttl_s=spec.ttl_s,
        replaces=spec.replaces.to_proto() if spec.replaces else None,
    )


def spec_from_proto(header: store_pb2.PutHeader, max_blob_bytes: int) -> PutSpec:
    """Raises: ProtocolError, InvalidKeyError, BlobTooLargeError."""
    if not header.HasField("key"):
        raise ProtocolError("a put needs a key")
    if not header.size:
        raise ProtocolError("a put of 0 bytes is no blob")
    if header.size > max_blob_bytes:
        raise BlobTooLargeError("size", header.size, max_blob_bytes)
    if header.ttl_s > MAX_TTL_S:
        raise ProtocolError(f"time to live of {header.ttl_s:,} s, at most {MAX_TTL_S:,}")
    return PutSpec(
        key=BlobKey.from_proto(header.key),
        size=header.size,
        stage=header.stage,
        ttl_s=header.ttl_s,
        replaces=BlobKey.from_proto(header.replaces) if header.HasField("replaces") else None,
    )


def info_to_proto(info: BlobInfo) -> store_pb2.BlobEntry:
    """One line of a listing."""
    codec = info.codec
    return store_pb2.BlobEntry(
        key=info.key.to_proto(),
        size=info.size,
        stored_unix_s=info.stored_unix_s,
        used_unix_s=info.used_unix_s,
        codec=blob_pb2.CodecSpec(
            name=codec.name,
            version=codec.version,
            params_json=codec.params_json,
            calibration_id=codec.calibration_id,
        ),
        model_id=info.model_id,
        token_start=info.tokens[0],
        token_end=info.tokens[1],
        layer_start=info.layers[0],
        layer_end=info.layers[1],
        head_start=info.heads[0],
        head_end=info.heads[1],
        model_layers=info.model_layers,
        model_heads=info.model_heads,
        previous_key=info.previous_key,
        near=info.near,
        expires_unix_s=info.expires_unix_s,
        namespace_tag=info.namespace_tag,
    )


def info_from_proto(entry: store_pb2.BlobEntry) -> BlobInfo:
    """Raises: InvalidKeyError."""
    codec = entry.codec
    return BlobInfo(
        key=BlobKey.from_proto(entry.key),
        size=entry.size,
        codec=CodecInfo(
            name=codec.name,
            version=codec.version,
            params_json=codec.params_json,
            calibration_id=codec.calibration_id,
        ),
        model_id=entry.model_id,
        previous_key=entry.previous_key,
        tokens=(entry.token_start, entry.token_end),
        layers=(entry.layer_start, entry.layer_end),
        heads=(entry.head_start, entry.head_end),
        model_layers=entry.model_layers,
        model_heads=entry.model_heads,
        stored_unix_s=entry.stored_unix_s,
        used_unix_s=entry.used_unix_s,
        near=entry.near,
        expires_unix_s=entry.expires_unix_s,
        namespace_tag=entry.namespace_tag,
    )


def info_from_header(header: blob_pb2.BlobHeader, key: BlobKey, size: int) -> BlobInfo:
    """What an index keeps of a blob's header."""
    codec = header.codec
    return BlobInfo(
        key=key,
        size=size,
        codec=CodecInfo(
            name=codec.name,
            version=codec.version,
            params_json=codec.params_json,
            calibration_id=codec.calibration_id,
        ),
        model_id=header.model_id,
        previous_key=header.previous_key,
        tokens=(header.token_start, header.token_end),
        layers=(header.layer_start, header.layer_end),
        heads=(header.head_start, header.head_end),
        model_layers=header.model_layers,
        model_heads=header.model_heads,
        namespace_tag=header.namespace_tag,
    )


def list_to_proto(query: ListQuery) -> store_pb2.ListRequest:
    """Filters of a listing."""
    return store_pb2.ListRequest(
        page_key=query.page_key,
        limit=query.limit,
        model_id=query.model_id,
        kind=kind_number(query.kind) if query.kind else blob_pb2.BLOB_KIND_UNSPECIFIED,
        previous_key=query.previous_key,
    )


def list_from_proto(request: store_pb2.ListRequest) -> ListQuery:
    """Raises: ProtocolError."""
    kind = kind_name(request.kind) if request.kind else ""
    if kind == "unknown":
        raise ProtocolError(f"blob kind {request.kind} is not known here")
    return ListQuery(
        page_key=digest("page key", request.page_key, optional=True),
        model_id=digest("model id", request.model_id, optional=True),
        kind=kind,
        limit=request.limit,
        previous_key=digest("previous key", request.previous_key, optional=True),
    )
