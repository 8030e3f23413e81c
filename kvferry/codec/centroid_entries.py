"""From labels to entries: means, counts, positions; and what merging cost."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.centroid_plain import Labels, Merging
from kvferry.codec.kept import Positions, Weights

_Wide = npt.NDArray[np.float64]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """Which tokens go into which entry. Entries of a row are in order of mean position.

    Attributes:
        rows, columns: (entries,) where each entry of all rows lies: its row, and its place.
        order: (rows x tokens,) tokens of all rows, those of an entry side by side.
        starts: (entries,) where an entry's tokens begin in ``order``.
        counts: (entries,) how many they are.
        width: entries of the row that has most.
    """

    rows: Labels
    columns: Labels
    order: Labels
    starts: Labels
    counts: Labels
    shape: tuple[int, int]
    width: int

    @classmethod
    def of(cls, labels: Labels) -> "Grouped":
        """Of (rows, tokens) labels; any numbers from 0 to tokens name entries."""
        rows, tokens = labels.shape
        names = (labels + np.arange(rows)[:, None] * tokens).reshape(-1)
        order = np.argsort(names, kind="stable")
        starts = np.flatnonzero(np.diff(names[order], prepend=-1))
        counts = np.diff(starts, append=len(order))
        row = names[order[starts]] // tokens
        middle = np.add.reduceat((order % tokens).astype(np.float64), starts) / counts
        rank = np.lexsort((middle, row))
        place = np.empty_like(rank)
        place[rank] = np.arange(len(rank))
        first = np.searchsorted(row[rank], np.arange(rows))
        columns = place - first[row]
        return cls(row, columns, order, starts, counts, (rows, tokens), int(columns.max()) + 1)

    def mean(self, vectors: FloatArray) -> FloatArray:
        """(rows, width, dim) float32 of (rows, tokens, dim); zeros behind a row's entries."""
        flat = vectors.reshape(-1, vectors.shape[2])[self.order].astype(np.float64)
        means = np.add.reduceat(flat, self.starts, axis=0) / self.counts[:, None]
        return self._placed(means.astype(np.float32))

    def weights(self) -> Weights:
        """(rows, width) tokens of each entry; 0 behind a row's entries."""
        return self._placed(self.counts.astype(np.float32))

    def positions(self, first: int) -> Positions:
        """(rows, width) rounded mean positions; behind a row's entries the last one's.

        Args:
            first: position of the first token.
        """
        places = (self.order % self.shape[1]).astype(np.float64)
        middle = np.rint(np.add.reduceat(places, self.starts) / self.counts).astype(np.int64)
        return np.maximum.accumulate(self._placed(middle), axis=1) + first

    def alone(self) -> tuple[Labels, Labels, Labels]:
        """Entries of a single token: their rows, their places, and the tokens."""
        single = self.counts == 1
        tokens = self.order[self.starts[single]] % self.shape[1]
        return self.rows[single], self.columns[single], tokens

    def entry_of(self) -> Labels:
        """(rows, tokens) place of the entry that each token went into."""
        found = np.empty(len(self.order), dtype=np.int64)
        found[self.order] = np.repeat(self.columns, self.counts)
        return found.reshape(self.shape)

    def _placed(self, found: npt.NDArray[T]) -> npt.NDArray[T]:
        out = np.zeros((self.shape[0], self.width, *found.shape[1:]), dtype=found.dtype)
        out[self.rows, self.columns] = found
        return out


def random_merging(labels: Labels, how: Merging, seed: int) -> Labels:
    """The control: groups of the same sizes, of tokens that chance put together.

    Tokens that ``how`` leaves alone stay alone.
    """
    batches = how.batches(labels.shape[1])
    if not batches:
        return labels.copy()
    part = slice(batches[0][0], batches[-1][1])
    found = labels.copy()
    found[:, part] = np.random.default_rng(seed).permuted(labels[:, part], axis=1)
    return found


def reconstruction_loss(vectors: FloatArray, labels: Labels) -> _Wide:
    """What is lost of each row where its entries' means take the tokens' places, (rows,).

    Args:
        vectors: (rows, tokens, dim), keys or values.
    Returns: squared distance over squared length, 0 to 1 for groups that make sense.
    """
    grouped = Grouped.of(labels)
    means = np.take_along_axis(grouped.mean(vectors), grouped.entry_of()[:, :, None], axis=1)
    difference = ((vectors - means) ** 2).sum(axis=(1, 2), dtype=np.float64)
    length = (vectors**2).sum(axis=(1, 2), dtype=np.float64)
    share: _Wide = np.divide(difference, length, out=np.zeros_like(length), where=length > 0)
    return share


def energy_loss(
    queries: FloatArray, keys: FloatArray, merged: FloatArray, weights: Weights, scale: float
) -> _Wide:
    """How far merging moves the energy of attention, in nats, (rows,).

    A query's energy is -log of the sum of exp(scale q.k) over all keys, the normalizer of
    its softmax. An entry stands in it with its count, as log(count) beside its score. The
    mean over queries of the absolute difference.

    Args:
        queries: (rows, queries, dim), rotated or not as keys are.
        keys: (rows, tokens, dim).
        merged: (rows, entries, dim), of ``weights`` (rows, entries) tokens each.
        scale: of scores; 1/sqrt(dim) in most models.
    """
    exact = _energy(_scores(queries, keys, scale))
    found = np.abs(exact - _energy(_scores(queries, merged, scale, weights)))
    mean: _Wide = found.mean(axis=1, dtype=np.float64)
    return mean


def attention_loss(
    queries: FloatArray,
    exact: tuple[FloatArray, FloatArray],
    merged: tuple[FloatArray, FloatArray],
    weights: Weights,
    scale: float,
) -> _Wide:
    """What is lost of attention's answers, (rows,): squared distance over squared length.

    Args:
        exact: keys and values, each (rows, tokens, dim).
        merged: (rows, entries, dim); the others as in `energy_loss`.
    """
    wanted = _answers(_scores(queries, exact[0], scale), exact[1])
    found = _answers(_scores(queries, merged[0], scale, weights), merged[1])
    length = (wanted**2).sum(axis=(1, 2))
    lost = ((found - wanted) ** 2).sum(axis=(1, 2))
    share: _Wide = np.divide(lost, length, out=np.zeros_like(length), where=length > 0)
    return share


def _scores(
    queries: FloatArray, keys: FloatArray, scale: float, weights: Weights | None = None
) -> _Wide:
    scores = scale * (queries.astype(np.float64) @ keys.astype(np.float64).transpose(0, 2, 1))
    if weights is None:
        return scores
    with np.errstate(divide="ignore"):
        biased: _Wide = scores + np.log(weights.astype(np.float64))[:, None]
    return biased


def _energy(scores: _Wide) -> _Wide:
    top = scores.max(axis=2, keepdims=True)
    found: _Wide = -(np.log(np.exp(scores - top).sum(axis=2)) + top[..., 0])
    return found


def _answers(scores: _Wide, values: FloatArray) -> _Wide:
    share = np.exp(scores - scores.max(axis=2, keepdims=True))
    share /= share.sum(axis=2, keepdims=True)
    found: _Wide = share @ values.astype(np.float64)
    return found
