"""Messages of store.proto to our dataclasses and back; what comes in is checked here."""

from collections.abc import Iterable, Sequence

from kvferry.cluster.listing import Listed
from kvferry.cluster.repository import (
    BlobInfo,
    CodecInfo,
    ListQuery,
    LookupQuery,
    LookupResult,
    PutSpec,
    StateFound,
    TailFound,
)
from kvferry.errors import BlobTooLargeError, ProtocolError
from kvferry.proto.keys import (
    DIGEST_BYTES,
    MAX_HEADS,
    MAX_LAYERS,
    BlobKey,
    kind_name,
    kind_number,
)
from kvferry.proto.v1 import blob_pb2, store_pb2

MAX_KEYS = 4096
MAX_PAGE_KEYS = 65_536
MAX_CODECS = 256
MAX_LISTING_BYTES = 48 << 20
_ENTRY_BYTES = 400
MAX_TTL_S = 10 * 365 * 86_400
MAX_LEASE_S = 30 * 86_400


def keys_from_proto(messages: Sequence[blob_pb2.BlobKey]) -> list[BlobKey]:
    """Raises: ProtocolError (too many), InvalidKeyError."""
    if len(messages) > MAX_KEYS:
        raise ProtocolError(f"{len(messages):,} keys in one call, at most {MAX_KEYS:,} are taken")
    return [BlobKey.from_proto(m) for m in messages]


def _digest(field: str, value: bytes, optional: bool = False) -> bytes:
    if len(value) == DIGEST_BYTES or (optional and not value):
        return value
    raise ProtocolError(f"{field} has {len(value)} bytes, {DIGEST_BYTES} wanted")


def _range(field: str, start: int, end: int, cap: int) -> tuple[int, int]:
    if end == 0 and start == 0:
        return 0, 0
    if not 0 <= start < end <= cap:
        raise ProtocolError(f"{field} {start}-{end} are no range")
    return start, end


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


def query_to_proto(query: LookupQuery) -> store_pb2.LookupRequest:
    """Raises: ProtocolError where the chain is longer than one call takes."""
    if len(query.page_keys) > MAX_PAGE_KEYS:
        raise ProtocolError(f"{len(query.page_keys):,} page keys, at most {MAX_PAGE_KEYS:,}")
    return store_pb2.LookupRequest(
        root=query.root,
        page_keys=query.page_keys,
        codecs=sorted(query.codecs),
        layer_start=query.layers[0],
        layer_end=query.layers[1],
        head_start=query.heads[0],
        head_end=query.heads[1],
        local_only=query.local_only,
        state_start=query.states[0],
        state_end=query.states[1],
        token_count=query.tokens,
    )


def query_from_proto(request: store_pb2.LookupRequest) -> LookupQuery:
    """Raises: ProtocolError."""
    if len(request.page_keys) > MAX_PAGE_KEYS:
        raise ProtocolError(f"{len(request.page_keys):,} page keys, at most {MAX_PAGE_KEYS:,}")
    if len(request.codecs) > MAX_CODECS or any(len(c) > 64 for c in request.codecs):
        raise ProtocolError(f"codecs: at most {MAX_CODECS} names of at most 64 characters")
    return LookupQuery(
        root=_digest("root", request.root),
        page_keys=[_digest("page key", key) for key in request.page_keys],
        codecs=frozenset(request.codecs),
        layers=_range("layers", request.layer_start, request.layer_end, MAX_LAYERS),
        heads=_range("heads", request.head_start, request.head_end, MAX_HEADS),
        local_only=request.local_only,
        states=_range("states", request.state_start, request.state_end, MAX_LAYERS),
        tokens=request.token_count,
    )


def result_to_bytes(query: LookupQuery, result: LookupResult) -> bytes:
    """A `LookupReply` in its encoding, whose pages are put in as they stand in memory.

    Messages joined are messages merged. The run is cut where its listing would exceed what
    one message carries.
    """
    reply = store_pb2.LookupReply(partial=result.partial)
    pages: list[bytes] = []
    left = MAX_LISTING_BYTES
    for page_key, blobs in zip(query.page_keys, result.pages, strict=False):
        page = _page_bytes(page_key, blobs)
        left -= len(page)
        if left < 0:
            break
        pages.append(page)
    reply.complete_pages = len(pages)
    if left >= 0:
        _add_anchored(reply, result, left)
    return b"".join((*pages, reply.SerializeToString()))


def _page_bytes(page_key: bytes, blobs: Sequence[BlobInfo]) -> bytes:
    """One page of a `LookupReply`. Kept with what is listed again and again."""
    if isinstance(blobs, Listed) and blobs.wire:
        return blobs.wire
    reply = store_pb2.LookupReply()
    reply.pages.add(page_key=page_key, blobs=[info_to_proto(b) for b in blobs])
    page = reply.SerializeToString()
    if isinstance(blobs, Listed):
        blobs.wire = page
    return page


def _add_anchored(reply: store_pb2.LookupReply, result: LookupResult, left: int) -> None:
    for tail in result.tails:
        left -= _listing_bytes(tail.blobs)
        if left < 0:
            return
        entries = [info_to_proto(b) for b in tail.blobs]
        reply.tails.add(tail_key=tail.tail_key, tokens=tail.tokens, blobs=entries)
    for state in result.states:
        left -= _listing_bytes(state.blobs)
        if left < 0:
            return
        entries = [info_to_proto(b) for b in state.blobs]
        reply.states.add(key=state.key, pages=state.pages, tokens=state.tokens, blobs=entries)


def _listing_bytes(blobs: Sequence[BlobInfo]) -> int:
    return sum(_ENTRY_BYTES + len(info.codec.params_json) for info in blobs)


def result_from_proto(query: LookupQuery, reply: store_pb2.LookupReply) -> LookupResult:
    """Raises: ProtocolError where the answer does not fit the question."""
    if not len(reply.pages) == reply.complete_pages <= len(query.page_keys):
        raise ProtocolError("a lookup's answer lists other pages than it counts")
    if any(p.page_key != k for p, k in zip(reply.pages, query.page_keys, strict=False)):
        raise ProtocolError("a lookup's answer is for other pages than asked")
    return LookupResult(
        pages=[_infos(page.blobs) for page in reply.pages],
        tails=[
            TailFound(
                tail_key=_digest("tail key", tail.tail_key),
                tokens=tail.tokens,
                blobs=_infos(tail.blobs),
            )
            for tail in reply.tails
        ],
        states=[
            StateFound(
                key=_digest("state key", state.key),
                pages=state.pages,
                tokens=state.tokens,
                blobs=_infos(state.blobs),
            )
            for state in reply.states
        ],
        partial=reply.partial,
    )


def _infos(entries: Iterable[store_pb2.BlobEntry]) -> list[BlobInfo]:
    return [info_from_proto(entry) for entry in entries]


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
        page_key=_digest("page key", request.page_key, optional=True),
        model_id=_digest("model id", request.model_id, optional=True),
        kind=kind,
        limit=request.limit,
        previous_key=_digest("previous key", request.previous_key, optional=True),
    )
