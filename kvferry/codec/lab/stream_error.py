"""How far restored tensors are from those that went in, by stream and layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import STATE_PREFIX, PageTensors
from kvferry.codec.mlx.adapters import CacheSnapshot

_Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StreamError:
    """One stream, keys as the cache has them.

    Attributes:
        mse: mean squared error over all values.
        relative: mean absolute error over mean absolute value.
        layers: ``relative`` of each layer.
    """

    mse: float
    relative: float
    layers: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """As ``kvferry eval --json`` has it."""
        return {"mse": self.mse, "relative": self.relative, "relative_by_layer": self.layers}


def stream_errors(snapshot: CacheSnapshot, pages: Sequence[PageTensors]) -> dict[str, StreamError]:
    """Compare pages of all layers with the snapshot they were made of.

    Returns: by stream; nothing where pages hold other entries than one for each token.
    """
    sums: dict[str, _Sums] = {}
    counts: dict[str, int] = {}
    for page in pages:
        exact = snapshot.page(page.layers, page.tokens)
        for name, stream in exact.streams.items():
            if name.startswith(STATE_PREFIX):
                continue
            found = page.streams.get(name)
            if found is None or found.data.shape != stream.data.shape:
                return {}
            own = _page_sums(stream.float32(), found.float32())
            sums[name] = sums.get(name, 0.0) + own
            counts[name] = counts.get(name, 0) + stream.data.size
    return {name: _error(total, counts[name]) for name, total in sums.items()}


def _page_sums(exact: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> _Sums:
    """(layers, 3): squared error, absolute error, absolute value, summed."""
    axes = (1, 2, 3)
    off = found - exact
    squared = np.einsum("lhtd,lhtd->l", off, off, dtype=np.float64)
    absolute = np.abs(off).sum(axis=axes, dtype=np.float64)
    size = np.abs(exact).sum(axis=axes, dtype=np.float64)
    return np.stack([squared, absolute, size], axis=1)


def _error(sums: _Sums, count: int) -> StreamError:
    by_layer = sums[:, 1] / np.maximum(sums[:, 2], 1e-30)
    squared, absolute, size = sums.sum(axis=0)
    return StreamError(
        mse=float(squared / count),
        relative=float(absolute / max(size, 1e-30)),
        layers=tuple(float(f"{value:.6g}") for value in by_layer),
    )
