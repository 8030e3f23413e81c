"""What is offered, from where its tensors come, and how it is coded."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from kvferry.cluster.repository import LookupQuery, LookupResult
from kvferry.codec.base import Codec, PageTensors
from kvferry.errors import FerryError
from kvferry.node.coding import CodedRange, Shard
from kvferry.proto.keys import BlobKey, Medium, media_within
from kvferry.proto.v1 import node_pb2


class TensorSource(Protocol):
    """A snapshot of a cache that can be read from another thread."""

    def page(self, layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        """Host tensors of absolute layers and tokens."""

    def state_pages(self, tokens: tuple[int, int], part: int = 0) -> Iterable[PageTensors]:
        """States at the end of ``tokens``, of consecutive state layers of one form; ``heads``
        says which part of them it is."""


class OfferClient(Protocol):
    """What an offer needs of the node daemon; see `kvferry.node.client.NodeClient`."""

    def admit(
        self, keys: Sequence[BlobKey], *, again: bool = False
    ) -> "Sequence[node_pb2.Admission.ValueType]":
        """Which are to be encoded and put; ``again``: the same request offered before."""

    def lookup(self, query: LookupQuery) -> LookupResult:
        """What the store has of a chain of pages. Raises: FerryError."""

    def put_later(
        self, key: BlobKey, data: bytes, *, ttl_s: int = 0, replaces: BlobKey | None = None
    ) -> Future[bool]:
        """Whether it was new, once it is durable. Raises, also later: FerryError."""

    def lost(self, error: FerryError) -> bool:
        """Whether ``error`` says that the daemon itself was not there."""

    def connected(self, timeout_s: float) -> bool:
        """Wait until the daemon is there; whether it is."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Tokens that a cache holds, and the cache's tensors.

    Attributes:
        restored_pages: so many pages came out of the store and are never coded again.
        lasting: its tail stays where it is when a conversation goes on from it.
        shared: its prompt goes on, and so do others in other ways: every whole page is
            coded as one, so that the tail stands where all their pages end.
        media: what the tokens do not tell.
        again: the same request has offered before.
    """

    tokens: tuple[int, ...]
    source: TensorSource
    restored_pages: int = 0
    lasting: bool = False
    shared: bool = False
    media: tuple[Medium, ...] = ()
    again: bool = False

    def goes_on_from(self, other: "Offer") -> bool:
        """Whether it holds all that ``other`` does."""
        end = len(other.tokens)
        mine = media_within(self.media, 0, end)
        return self.tokens[:end] == other.tokens and mine == media_within(other.media, 0, end)


@dataclass(frozen=True, slots=True)
class Coding:
    """How offers are coded now: a policy made concrete for one shard and namespace.

    Attributes:
        pages: how pages of this shard are coded.
        tail: codec of tails; None: they are computed again.
        enabled: False: the policy stores nothing.
        accept: codecs that restores take; empty: any.
        namespace_tag: what blobs say of their namespace.
    """

    shard: Shard
    root: bytes
    pages: Sequence[CodedRange]
    tail: Codec | None
    tail_ttl_s: int
    enabled: bool = True
    accept: frozenset[str] = frozenset()
    namespace_tag: int = 0
