"""Several pages as one: of consecutive layers, or of consecutive tokens."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import PageTensors, Stream
from kvferry.codec.kept import Kept, Positions, Weights
from kvferry.errors import UnsupportedTensorError


def join_layers(parts: Sequence[PageTensors]) -> PageTensors:
    """Pages of the same tokens, of consecutive layers, as one.

    Where codecs kept different entries in different layers, layers that have fewer are
    padded at the end with entries of weight 0.

    Raises: UnsupportedTensorError: some are to be placed side by side, others not.
    """
    first = parts[0]
    kept = _joined(parts)
    count = first.entries if kept is None else kept.count
    streams = {
        name: Stream(
            name, np.concatenate([_padded(p.streams[name].data, count) for p in parts]), s.dtype
        )
        for name, s in first.streams.items()
    }
    layers = (first.layers[0], parts[-1].layers[1])
    return PageTensors(layers, first.heads, first.tokens, streams, kept)


def join_tokens(pages: Sequence[PageTensors]) -> PageTensors:
    """Pages of the same layers, of consecutive tokens, as one; of some or all tokens.

    Raises: UnsupportedTensorError: some are to be placed side by side, others where they
        were.
    """
    first = pages[0]
    streams = {
        name: Stream(name, np.concatenate([p.streams[name].data for p in pages], axis=2), s.dtype)
        for name, s in first.streams.items()
    }
    tokens = (first.tokens[0], pages[-1].tokens[1])
    kept = None
    if found := [p.kept for p in pages if p.kept is not None]:
        every = [_every(p) for p in pages]
        shared = all(k.positions.ndim == 1 for k in every)
        weighted = any(k.weights is not None for k in every)
        both = every if shared else [_wide(p, k) for p, k in zip(pages, every, strict=True)]
        kept = Kept(
            np.concatenate([k.positions for k in both], axis=-1),
            np.concatenate([_weights(k) for k in both], axis=-1) if weighted else None,
            _contiguous(found),
        )
    return PageTensors(first.layers, first.heads, tokens, streams, kept)


def _joined(parts: Sequence[PageTensors]) -> Kept | None:
    found = [p.kept for p in parts if p.kept is not None]
    if not found:
        return None
    every = [_every(p) for p in parts]
    shared = every[0].positions
    if all(k.positions.ndim == 1 and np.array_equal(k.positions, shared) for k in every):
        return Kept(shared, contiguous=_contiguous(found))
    count = max(kept.count for kept in every)
    plain = all(kept.weights is None and kept.count == count for kept in every)
    wide = [_lengthened(_wide(p, k), count) for p, k in zip(parts, every, strict=True)]
    return Kept(
        np.concatenate([k.positions for k in wide]),
        None if plain else np.concatenate([_weights(k) for k in wide]),
        _contiguous(found),
    )


def _every(page: PageTensors) -> Kept:
    return page.kept or Kept(np.arange(*page.tokens, dtype=np.int64))


def _contiguous(found: Sequence[Kept]) -> bool:
    if len({kept.contiguous for kept in found}) > 1:
        raise UnsupportedTensorError("kept", "pages differ in where their entries are to be")
    return found[0].contiguous


def _wide(page: PageTensors, kept: Kept) -> Kept:
    """Per layer and head."""
    shape = (page.layers[1] - page.layers[0], page.heads[1] - page.heads[0], kept.count)
    return Kept(np.broadcast_to(kept.positions, shape), kept.weights)


def _weights(kept: Kept) -> Weights:
    """Of a `Kept` per layer and head."""
    return np.ones(kept.positions.shape, np.float32) if kept.weights is None else kept.weights


def _lengthened(kept: Kept, count: int) -> Kept:
    missing = count - kept.count
    if not missing:
        return kept
    last: Positions = np.repeat(kept.positions[..., -1:], missing, axis=-1)
    positions = np.concatenate([kept.positions, last], axis=-1)
    return Kept(positions, np.pad(_weights(kept), ((0, 0), (0, 0), (0, missing))))


def _padded(data: npt.NDArray[np.generic], count: int) -> npt.NDArray[np.generic]:
    missing = count - data.shape[2]
    return np.pad(data, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else data
