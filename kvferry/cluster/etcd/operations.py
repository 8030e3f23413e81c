"""What transactions are made of, and what they answer. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from kvferry.proto.v1 import etcd_pb2 as pb

Compare = pb.Compare
Operation = pb.RequestOp


@dataclass(frozen=True, slots=True)
class Item:
    """A key with its value.

    Attributes:
        created: revision of etcd at which the key came into being.
        modified: revision of its last change.
        lease: it goes with this lease; 0: it stays.
    """

    key: bytes
    value: bytes
    created: int
    modified: int
    lease: int


@dataclass(frozen=True, slots=True)
class Found:
    """Items as of a revision: a watch that begins after it misses nothing."""

    items: tuple[Item, ...]
    revision: int

    @property
    def item(self) -> Item | None:
        """The first of them."""
        return self.items[0] if self.items else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a transaction: whether its conditions held, and what its reads found, in order."""

    held: bool
    revision: int
    reads: tuple[Item | None, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A key was put (``item`` has its value) or deleted."""

    item: Item
    deleted: bool


def absent(key: bytes) -> Compare:
    """Holds while there is no such key."""
    return created_at(key, 0)


def created_at(key: bytes, revision: int) -> Compare:
    """Holds while the key is the one that was created at ``revision``."""
    return pb.Compare(key=key, target=pb.Compare.CREATE, create_revision=revision)


def unchanged(key: bytes, revision: int) -> Compare:
    """Holds while the key was last changed at ``revision``; 0: while there is none."""
    return pb.Compare(key=key, target=pb.Compare.MOD, mod_revision=revision)


def put(key: bytes, value: bytes, lease: int = 0) -> Operation:
    """Set a key, for as long as ``lease`` lives."""
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def get(key: bytes) -> Operation:
    """Read a key."""
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def delete(key: bytes) -> Operation:
    """Remove a key."""
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


def end_of(prefix: bytes) -> bytes:
    """The least key after all that begin with ``prefix``, which is not all 0xff."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes((head[-1] + 1,))


def to_item(kv: pb.KeyValue) -> Item:
    """A key as etcd says it."""
    return Item(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def to_outcome(reply: pb.TxnResponse) -> Outcome:
    """A transaction's answer."""
    ranges: Iterable[pb.RangeResponse] = (
        answer.response_range
        for answer in reply.responses
        if answer.WhichOneof("response") == "response_range"
    )
    reads = tuple(to_item(found.kvs[0]) if found.kvs else None for found in ranges)
    return Outcome(reply.succeeded, reply.header.revision, reads)
