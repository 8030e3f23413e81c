"""Online merging of similar tokens (MP-KVM), one head and one token at a time: to be read.

`kvferry.codec.centroid_cluster` does the same for all heads at once.

Tokens leave a sliding window in batches. Each of a batch joins the entry whose mean key is
most like its own, if the cosine reaches a threshold; else it opens an entry that later ones
may join. Keys are compared un-rotated: rotated ones differ by where they stand.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.errors import ConfigError

Labels = npt.NDArray[np.int64]
GRID = 2.0**-30  # cosines are rounded to it, so that no sum's order decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging:
    """How tokens are merged.

    Attributes:
        similarity: cosine of un-rotated keys from which on a token joins an entry.
        window: most recent tokens, which are left alone.
        init_preserve: first tokens of a sequence, likewise.
        flush: tokens that leave the window at once; entries' means move between batches.
        persistence: batches for which an entry that nothing joined can still be joined;
            0: for ever.
        min_merge: a batch opens an entry of several tokens only if they are this many.
    """

    similarity: float = 0.9
    window: int = 32
    init_preserve: int = 4
    flush: int = 64
    persistence: int = 16
    min_merge: int = 2

    def __post_init__(self) -> None:
        if not -1 <= self.similarity <= 1:
            raise ConfigError("similarity", self.similarity, "a cosine, -1 to 1")
        for name, least in (
            ("window", 0), ("init_preserve", 0), ("flush", 1), ("persistence", 0),
            ("min_merge", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"{least} or more")

    def batches(self, tokens: int) -> list[tuple[int, int]]:
        """What leaves the window of a run of tokens, batch by batch, half-open."""
        end = tokens - self.window
        starts = range(min(self.init_preserve, tokens), max(end, 0), self.flush)
        return [(start, min(start + self.flush, end)) for start in starts]


def merge_head(keys: npt.NDArray[np.floating], how: Merging) -> Labels:
    """Which entry each token of a head goes into, named by the token that opened it.

    Args:
        keys: (tokens, dim), un-rotated, finite.
    Returns: (tokens,); a token that is an entry of its own, or opens one, has its own index.
    """
    labels = np.arange(len(keys), dtype=np.int64)
    sums: dict[int, npt.NDArray[np.float64]] = {}  # of the keys in each entry
    joined_in: dict[int, int] = {}  # the batch in which an entry was joined last
    for number, (start, end) in enumerate(how.batches(len(keys))):
        open_ = [e for e in sums if not how.persistence or number - joined_in[e] <= how.persistence]
        means = {entry: _unit(sums[entry]) for entry in sorted(open_)}
        opened: dict[int, list[int]] = {}
        for token in range(start, end):
            key = _unit(keys[token])
            best, nearest = how.similarity, None
            for entry, mean in [*means.items(), *((t, _unit(keys[t])) for t in opened)]:
                cosine = round(float(key @ mean) / GRID) * GRID
                if cosine > best or (cosine == best and nearest is None):
                    best, nearest = cosine, entry
            if nearest is None:
                opened[token] = [token]
            elif nearest in opened:
                opened[nearest].append(token)
            else:
                labels[token] = nearest
        for token in range(start, end):
            if labels[token] != token:
                sums[int(labels[token])] = sums[int(labels[token])] + keys[token]
                joined_in[int(labels[token])] = number
        for leader, tokens in opened.items():
            alone = len(tokens) < how.min_merge
            for token in tokens:
                entry = token if alone else leader
                labels[token] = entry
                sums[entry] = sums.get(entry, np.zeros(keys.shape[1])) + keys[token]
                joined_in[entry] = number
    return labels


def _unit(vector: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    wide = vector.astype(np.float64)
    norm = math.sqrt(float(wide @ wide))
    return wide / norm if norm > 0 else wide
