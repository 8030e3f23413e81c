"""Keys at other positions than those where the model made them."""

from collections.abc import Sequence

import numpy as np

from kvferry.codec import rope
from kvferry.codec.base import PageTensors, Stream, clip_to, store_float32
from kvferry.codec.kept import Positions
from kvferry.codec.rope import RopeSpec
from kvferry.errors import UnsupportedTensorError

ROTATED = ("k", "rope_key")
_STREAMS = {"k", "v", "latent", "rope_key"}


def side_by_side(page: PageTensors, ropes: Sequence[RopeSpec]) -> PageTensors:
    """Entries at positions 0, 1, 2, ...: keys un-rotated in float32 and rotated anew.

    Keys that do not move keep every bit.

    Args:
        page: with `PageTensors.kept`.
        ropes: of each layer of the page.
    Returns: a page of tokens (0, entries), all of them there.
    Raises: UnsupportedTensorError: streams of which it is not known whether they rotate.
    """
    if odd := set(page.streams) - _STREAMS:
        raise UnsupportedTensorError(min(odd), "cannot be moved to other positions")
    count = page.entries
    old = page.kept.positions if page.kept is not None else np.arange(*page.tokens, dtype=np.int64)
    streams = dict(page.streams)
    for name in ROTATED:
        if name in streams:
            streams[name] = _moved(streams[name], old, ropes)
    return PageTensors(page.layers, page.heads, (0, count), streams)


def _moved(stream: Stream, old: Positions, ropes: Sequence[RopeSpec]) -> Stream:
    new = np.arange(stream.data.shape[2], dtype=np.int64)
    start = int(np.argmax(old != new)) if old.ndim == 1 and (old != new).any() else 0
    if old.ndim == 1 and np.array_equal(old, new):
        return stream
    data = stream.data.copy()
    part = Stream(stream.name, stream.data[:, :, start:], stream.dtype)
    for layer, spec in enumerate(ropes):
        at = old[start:] if old.ndim == 1 else old[layer]
        plain = rope.undo(part.float32()[layer], spec, at)
        moved = clip_to(rope.apply(plain, spec, new[start:]), stream.dtype)
        store_float32(data[layer, :, start:], moved, stream.dtype)
    return Stream(stream.name, data, stream.dtype)
