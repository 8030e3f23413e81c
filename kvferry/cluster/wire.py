"""Chunks of blobs on the wire, without protobuf's copies.

A chunk is ``PutRequest`` or ``GetReply`` with only field 1 set, so its bytes are one tag,
one varint and the data: joined and taken apart here by hand, and readable by any
protobuf implementation. Everything else goes through the generated messages.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from kvferry.proto.v1 import store_pb2

MIB = 1 << 20
CHUNK_BYTES = MIB
MAX_REQUEST_BYTES = 4 * MIB + 64 * 1024
MAX_REPLY_BYTES = 64 * MIB
SERVICE = "kvferry.v1.BlobStore"
PUT_METHOD = f"/{SERVICE}/Put"
GET_METHOD = f"/{SERVICE}/Get"

_DATA_TAG = 0x0A
_MAX_VARINT_BYTES = 10

Chunk = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message that is in its encoding already."""

    message: bytes


Outgoing = Message | Chunk | Encoded


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message of the expected kind; the handler refuses them."""

    problem: str


class _Parses(Protocol):
    @classmethod
    def FromString(cls, s: bytes) -> Message: ...  # noqa: N802 - protobuf's name


M = TypeVar("M", bound=Message)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def join_chunk(data: Chunk) -> bytes:
    """The message with field 1 = ``data``: the one copy that is made on the way out."""
    return b"".join((bytes((_DATA_TAG,)), _varint(len(data)), data))


def split_chunk(raw: bytes) -> memoryview | None:
    """The data of a message that has field 1 only, as a view; None for any other."""
    if not raw or raw[0] != _DATA_TAG:
        return None
    length = shift = 0
    for at in range(1, min(len(raw), 1 + _MAX_VARINT_BYTES)):
        byte = raw[at]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            whole = at + 1 + length == len(raw)
            return memoryview(raw)[at + 1 :] if whole else None
        shift += 7
    return None


def serialize(item: Outgoing) -> bytes:
    """Serializer of both streams: a chunk or a message."""
    if isinstance(item, Message):
        return item.SerializeToString()
    if isinstance(item, Encoded):
        return item.message
    return join_chunk(item)


def _deserializer(kind: type[M]) -> Callable[[bytes], M | memoryview | Malformed]:
    def deserialize(raw: bytes) -> M | memoryview | Malformed:
        data = split_chunk(raw)
        if data is not None:
            return data
        try:
            return kind.FromString(raw)
        except DecodeError:
            return Malformed(f"{len(raw):,} bytes are no {kind.DESCRIPTOR.name}")

    return deserialize


PutItem = store_pb2.PutRequest | memoryview | Malformed
GetItem = store_pb2.GetReply | memoryview | Malformed
deserialize_put: Callable[[bytes], PutItem] = _deserializer(store_pb2.PutRequest)
deserialize_get: Callable[[bytes], GetItem] = _deserializer(store_pb2.GetReply)


def chunks_of(data: Chunk, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Views of at most ``size`` bytes, in order; none for no data."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), size):
        yield view[start : start + size]


def channel_options(max_receive_bytes: int, *, near: bool = False) -> list[tuple[str, int]]:
    """Options of channels and servers alike.

    No proxy from the environment, no compression, quick reconnects, and a socket of
    its own for each channel. ``near``: over a Unix socket, where trying costs nothing.
    """
    return [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", MAX_REPLY_BYTES),
        # A chunk in one frame: about 5 % more than with frames of 16 KiB.
        ("grpc.http2.max_frame_size", CHUNK_BYTES + 1024),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Also how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", 3000),
        ("grpc.max_reconnect_backoff_ms", 200 if near else 2000),
        ("grpc.max_metadata_size", 16 * 1024),
    ]
