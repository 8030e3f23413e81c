"""Tails that this process put, to be replaced when their conversations go on."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from kvferry.node.offer import Offer
from kvferry.proto.keys import BlobKey, media_within, tail_key

REMEMBERED_TAILS = 64


@dataclass(frozen=True, slots=True)
class Tail:
    """A tail that was put, with its states.

    Attributes:
        start: its first token.
        previous: key of the page before it.
        tail_key: its identity.
        tokens: that it holds.
        key: of its blob; None: it has none here.
        states: of the blobs of its states, by their layers.
    """

    start: int
    previous: bytes
    tail_key: bytes
    tokens: int
    key: BlobKey | None
    states: Mapping[tuple[int, int], BlobKey]


class Tails:
    """The newest of them."""

    def __init__(self) -> None:
        self._tails: OrderedDict[bytes, Tail] = OrderedDict()

    def outdated(self, offer: Offer) -> Tail | None:
        """The newest that an offer goes on from."""
        for identity, tail in reversed(self._tails.items()):
            end = tail.start + tail.tokens
            longer = end < len(offer.tokens)
            if longer and key_of_tail(tail.previous, offer, tail.start, end) == identity:
                return tail
        return None

    def replaced(self, old: Tail | None) -> None:
        """Its blobs gave way to others."""
        if old is not None:
            self._tails.pop(old.tail_key, None)

    def put(self, tail: Tail) -> None:
        """One more; the oldest are forgotten."""
        self._tails[tail.tail_key] = tail
        while len(self._tails) > REMEMBERED_TAILS:
            self._tails.popitem(last=False)


def key_of_tail(previous: bytes, offer: Offer, start: int, end: int) -> bytes:
    """Identity of the tail of ``offer`` that holds exactly these tokens."""
    return tail_key(previous, offer.tokens[start:end], media_within(offer.media, start, end))
