"""A set of keys in a few kilobytes, which says yes to some that were never added.

Bloom, "Space/time trade-offs in hash coding with allowable errors", CACM 13 (1970); two
hashes stand for all as in Kirsch and Mitzenmacher, "Less hashing, same performance" (2006).
"""

import math
from collections.abc import Iterable
from typing import Self

from blake3 import blake3

from kvferry.errors import ProtocolError
from kvferry.proto.keys import BlobKey

BITS_A_KEY = 12
MIN_BYTES = 1024
MAX_BYTES = 64 * 1024
MAX_HASHES = 16


def item_of(key: BlobKey) -> bytes:
    """What stands for a blob in a filter: 16 bytes."""
    return blake3(str(key).encode()).digest(16)


def page_item(page_key: bytes) -> bytes:
    """What stands for anything held under a page key: 16 bytes."""
    return blake3(page_key).digest(16)


class Bloom:
    """A filter of fixed size over items of 16 bytes."""

    def __init__(self, bits: bytes | bytearray, hashes: int) -> None:
        """Raises: ProtocolError: sizes that no filter has."""
        if not (0 < len(bits) <= MAX_BYTES and 1 <= hashes <= MAX_HASHES):
            raise ProtocolError(f"a filter of {len(bits):,} bytes and {hashes} hashes is none")
        self.bits, self.hashes = bytearray(bits), hashes

    @classmethod
    def for_count(cls, count: int) -> Self:
        """Empty, with room for ``count`` items: of at most `MAX_BYTES`, however many they are."""
        size = min(MAX_BYTES, max(MIN_BYTES, -(-count * BITS_A_KEY // 8)))
        best = round(8 * size / max(1, count) * math.log(2))
        return cls(bytes(size), min(8, max(1, best)))

    @property
    def capacity(self) -> int:
        """Items up to which one in a few hundred is said to be there and is not."""
        return 8 * len(self.bits) // BITS_A_KEY

    @property
    def may_grow(self) -> bool:
        """Whether a larger one is allowed."""
        return len(self.bits) < MAX_BYTES

    def _places(self, item: bytes) -> Iterable[int]:
        first = int.from_bytes(item[:8], "little")
        step = int.from_bytes(item[8:16], "little") | 1
        total = 8 * len(self.bits)
        return ((first + n * step) % total for n in range(self.hashes))

    def add(self, item: bytes) -> None:
        """From now on it is there."""
        for place in self._places(item):
            self.bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, item: bytes) -> bool:
        return all(self.bits[place >> 3] >> (place & 7) & 1 for place in self._places(item))
