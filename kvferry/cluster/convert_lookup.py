"""Lookups of store.proto to our dataclasses and back; what comes in is checked here."""

from collections.abc import Iterable, Sequence

from kvferry.cluster.convert import digest, info_from_proto, info_to_proto
from kvferry.cluster.listing import Listed
from kvferry.cluster.repository import (
    BlobInfo,
    LookupQuery,
    LookupResult,
    StateFound,
    TailFound,
)
from kvferry.errors import ProtocolError
from kvferry.proto.keys import MAX_HEADS, MAX_LAYERS
from kvferry.proto.v1 import store_pb2

MAX_PAGE_KEYS = 65_536
MAX_CODECS = 256
MAX_LISTING_BYTES = 48 << 20
_ENTRY_BYTES = 400


def _range(field: str, start: int, end: int, cap: int) -> tuple[int, int]:
    if end == 0 and start == 0:
        return 0, 0
    if not 0 <= start < end <= cap:
        raise ProtocolError(f"{field} {start}-{end} are no range")
    return start, end


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
        root=digest("root", request.root),
        page_keys=[digest("page key", key) for key in request.page_keys],
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
                tail_key=digest("tail key", tail.tail_key),
                tokens=tail.tokens,
                blobs=_infos(tail.blobs),
            )
            for tail in reply.tails
        ],
        states=[
            StateFound(
                key=digest("state key", state.key),
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
