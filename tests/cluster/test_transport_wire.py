"""Chunks on the wire are protobuf, byte for byte."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cluster import wire
from kvferry.proto.v1 import store_pb2

MESSAGES = (store_pb2.PutRequest, store_pb2.GetReply)


@given(st.binary(min_size=1, max_size=70_000))
def test_joined_chunk_is_what_protobuf_writes(data: bytes) -> None:
    for kind in MESSAGES:
        assert wire.join_chunk(memoryview(data)) == kind(data=data).SerializeToString()


@given(st.binary(max_size=70_000))
def test_chunk_survives_the_trip(data: bytes) -> None:
    raw = wire.serialize(data)
    assert store_pb2.GetReply.FromString(raw).data == data
    assert wire.deserialize_get(raw) == data
    assert wire.deserialize_put(raw) == data


@given(st.binary(max_size=300), st.integers(0, 2**40))
def test_messages_with_a_header_stay_messages(data: bytes, size: int) -> None:
    reply = store_pb2.GetReply(data=data, header=store_pb2.GetHeader(size=size, source="x"))
    assert wire.deserialize_get(wire.serialize(reply)) == reply


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(raw: bytes) -> None:
    item = wire.deserialize_put(raw)
    try:
        wanted = store_pb2.PutRequest.FromString(raw)
    except DecodeError:
        assert isinstance(item, wire.Malformed)
        return
    if isinstance(item, memoryview):
        assert wanted == store_pb2.PutRequest(data=bytes(item))
    else:
        assert item == wanted


@pytest.mark.parametrize("cut", range(1, 20))
def test_truncated_chunk_is_malformed(cut: int) -> None:
    raw = wire.join_chunk(b"x" * 18)
    assert isinstance(wire.deserialize_put(raw[:-cut] or b"\x0a"), wire.Malformed)


def test_overlong_varint_is_not_believed() -> None:
    assert wire.split_chunk(b"\x0a" + b"\xff" * 20) is None


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_chunks_are_all_the_data_in_order(data: bytes, size: int) -> None:
    parts = list(wire.chunks_of(data, size))
    assert b"".join(parts) == data
    assert all(len(part) == size for part in parts[:-1])
