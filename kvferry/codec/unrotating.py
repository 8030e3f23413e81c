"""Codecs without a calibration that look at keys as they were before RoPE."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from kvferry.codec.base import Codec
from kvferry.codec.rope import RopeSpec

Ropes = Callable[[], Sequence[RopeSpec]]


@runtime_checkable
class UnrotatingCodec(Protocol):
    """A codec that has to be told how keys are rotated before it can encode."""

    def with_ropes(self, ropes: Sequence[RopeSpec]) -> Codec:
        """The same codec for pages of layers that rotate so, one for each layer."""


def told_ropes(codec: Codec, ropes: Ropes | None, part: slice) -> Codec:
    """``codec``, told if it asks.

    Args:
        ropes: gives each layer's; None: nobody knows, and encoding will say so.
        part: which of them the codec's pages have.
    """
    if ropes is None or not isinstance(codec, UnrotatingCodec):
        return codec
    return codec.with_ropes(list(ropes())[part])
