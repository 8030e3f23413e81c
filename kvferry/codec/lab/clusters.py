"""Keys of one head on a plane: those that went in, and those that came back."""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.rope import RopeSpec, positions_of, undo

_SEED = 1
_MIN_FOR_UMAP = 20
Plane = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """Keys of one layer and head, RoPE undone.

    Attributes:
        values: (entries, dim) float32.
        positions: (entries,) int64.
        weights: (entries,) float32: how many tokens each stands for.
    """

    values: FloatArray
    positions: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]

    def sample(self, count: int) -> "Keys":
        """At most ``count`` of them, evenly spread."""
        if len(self.values) <= count:
            return self
        chosen = np.linspace(0, len(self.values) - 1, count).round().astype(np.int64)
        return Keys(self.values[chosen], self.positions[chosen], self.weights[chosen])


def head_keys(
    pages: Sequence[PageTensors], layer: int, head: int, rope: RopeSpec | None, stream: str = "k"
) -> Keys:
    """Of pages of all layers, in order; entries that stand for nothing are left out."""
    values, positions, weights = [], [], []
    for page in pages:
        index = layer - page.layers[0]
        own = page.streams[stream].float32()[index]
        own = own[min(head - page.heads[0], len(own) - 1)]
        at, weight = _standing(page, index, head - page.heads[0])
        real = weight > 0
        own, at, weight = own[real], at[real], weight[real]
        values.append(own if rope is None else undo(own, rope, at))
        positions.append(at)
        weights.append(weight)
    return Keys(np.concatenate(values), np.concatenate(positions), np.concatenate(weights))


def _standing(
    page: PageTensors, layer: int, head: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Position and weight of each entry of a head."""
    kept: Any = getattr(page, "kept", None)
    if kept is None:
        at = positions_of(page.tokens)
        return at, np.ones(len(at), np.float32)
    at = kept.positions if kept.positions.ndim == 1 else kept.positions[layer, head]
    if kept.weights is None:
        return at, np.ones(len(at), np.float32)
    return at, kept.weights[layer, head]


def nearest(points: FloatArray, centres: FloatArray) -> npt.NDArray[np.int64]:
    """(points,) index of the centre that each is most alike to, by cosine."""
    unit = [
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (points, centres)
    ]
    found: npt.NDArray[np.int64] = np.argmax(unit[0] @ unit[1].T, axis=1)
    return found


def pca(exact: FloatArray, restored: FloatArray) -> tuple[Plane, Plane, float]:
    """Both on the plane of largest variance of ``exact``.

    Returns: (entries, 2) each, and the share of variance that the plane holds.
    """
    mean = exact.mean(axis=0, dtype=np.float64)
    _, sizes, directions = np.linalg.svd(exact - mean, full_matrices=False)
    plane = directions[:2].T
    share = float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-30))
    return (exact - mean) @ plane, (restored - mean) @ plane, share


def umap(exact: FloatArray, restored: FloatArray) -> tuple[Plane, Plane] | None:
    """Both, laid out together (UMAP, McInnes et al. 2018; extra ``lab``).

    Returns: (entries, 2) each; None where the package is missing, or there are too few.
    """
    if importlib.util.find_spec("umap") is None or len(exact) + len(restored) < _MIN_FOR_UMAP:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that it could use and does not need
        import umap as package

        layout = package.UMAP(n_components=2, random_state=_SEED, n_jobs=1)
        found = np.asarray(layout.fit_transform(np.concatenate([exact, restored])), np.float64)
    return found[: len(exact)], found[len(exact) :]
