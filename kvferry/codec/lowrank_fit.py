"""From pages of a model to a calibration of `lowrank`: a covariance per head, streamed."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy.typing as npt

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.covariance import CovarianceAccumulator, SavedLayout, SavedTensors
from kvferry.codec.lowrank_calibration import STREAMS, UNKNOWN_NORM, LowRankCalibration
from kvferry.codec.lowrank_heads import HeadBasis, fit_heads
from kvferry.codec.lowrank_null import without
from kvferry.codec.rope import RopeSpec
from kvferry.codec.rows import page_values
from kvferry.errors import UnsupportedTensorError
from kvferry.proto.keys import SINK_TOKENS

# A head's values beyond its directions that were seen would be pure chance.
_TOKENS_PER_DIM = 2


class HeadAccumulator:
    """Mean and covariance of every head of K and V, of all layers and heads at once.

    Memory: (layers, heads, dim, dim) float64 per stream, whatever the number of tokens:
    6 MB for SmolLM2-135M.

    Args:
        shapes: "k" and "v" -> (heads, dim).
        ropes: rotated stream -> one spec per layer.
    """

    def __init__(
        self,
        *,
        model_id: bytes,
        layers: tuple[int, int],
        heads: tuple[int, int],
        shapes: Mapping[str, tuple[int, int]],
        ropes: Mapping[str, Sequence[RopeSpec]],
    ) -> None:
        if tuple(sorted(shapes)) != STREAMS:
            found = ", ".join(sorted(shapes))
            raise UnsupportedTensorError("*", f"lowrank codes K and V, and this model has {found}")
        self.model_id, self.layers, self.heads = model_id, layers, heads
        self.ropes = {name: tuple(specs) for name, specs in ropes.items() if name in shapes}
        self._shapes = dict(shapes)
        count = layers[1] - layers[0]
        self._seen = {
            name: CovarianceAccumulator(dim, (count, wide)) for name, (wide, dim) in shapes.items()
        }

    @classmethod
    def like(cls, old: LowRankCalibration) -> Self:
        """Empty, for other pages of the model that ``old`` is a calibration of."""
        return cls(
            model_id=old.model_id,
            layers=old.layers,
            heads=old.heads,
            shapes={name: (part.heads, part.dim) for name, part in old.streams.items()},
            ropes=old.ropes,
        )

    @property
    def tokens(self) -> int:
        """Tokens seen, without the exact ones."""
        return min(seen.count for seen in self._seen.values())

    def add(self, page: PageTensors) -> None:
        """Take in a page of any length; the first tokens of a sequence are left out.

        Raises: UnsupportedTensorError.
        """
        if (page.layers, page.heads) != (self.layers, self.heads):
            raise UnsupportedTensorError("*", f"layers {page.layers}, heads {page.heads}")
        first = max(page.tokens[0], SINK_TOKENS)
        if first >= page.tokens[1]:
            return
        if not set(self._seen) <= set(page.streams):
            raise UnsupportedTensorError("*", f"streams {sorted(page.streams)}, k and v wanted")
        for name, seen in self._seen.items():
            seen.add(page_values(page, name, self.ropes.get(name), first))

    def merge(self, other: "HeadAccumulator") -> None:
        """Take in what was seen elsewhere of the same layers and heads."""
        for name, seen in self._seen.items():
            seen.merge(other._seen[name])

    def layout(self) -> SavedLayout:
        """Names, shapes and dtypes of `tensors`."""
        count, found = self.layers[1] - self.layers[0], SavedLayout()
        for name, (wide, dim) in self._shapes.items():
            parts = CovarianceAccumulator.state_layout(dim, (count, wide))
            found |= {f"{name}/{part}": kind for part, kind in parts.items()}
        return found

    def tensors(self) -> SavedTensors:
        """Views of all that was summed up."""
        return {
            f"{name}/{part}": value
            for name, seen in self._seen.items()
            for part, value in seen.state.items()
        }

    def load(self, tensors: SavedTensors) -> None:
        """Go on from what `tensors` gave. Raises: KeyError."""
        parts = CovarianceAccumulator.state_layout(1)
        self._seen = {
            name: CovarianceAccumulator.of_state({p: tensors[f"{name}/{p}"] for p in parts})
            for name in self._seen
        }

    def finish(
        self,
        source: str,
        *,
        norm: str = UNKNOWN_NORM,
        nulls: Mapping[str, FloatArray] | None = None,
    ) -> LowRankCalibration:
        """One basis per head.

        Args:
            source: where the text came from, for people.
            norm: see `LowRankCalibration`.
            nulls: stream -> (layers, heads, dim), the unit vector that the weights say is
                empty, zeros where a head has none. Taken where the text agrees.
        Raises: UnsupportedTensorError: too little was seen.
        """
        dims = [dim for _, dim in self._shapes.values()]
        if self.tokens < _TOKENS_PER_DIM * max(dims):
            wanted = f"at least {_TOKENS_PER_DIM * max(dims):,} tokens"
            raise UnsupportedTensorError("*", f"{self.tokens:,} tokens to calibrate on; {wanted}")
        bases: dict[str, HeadBasis] = {}
        flags: dict[str, npt.NDArray[Any]] = {}
        for name, seen in self._seen.items():
            covariance = seen.covariance()
            null = None if nulls is None else nulls.get(name)
            if null is not None:
                covariance, flag = without(covariance, null)
                if flag.any():
                    flags[name] = flag
            bases[name] = fit_heads(seen.mean(), covariance)
        return LowRankCalibration(
            model_id=self.model_id,
            layers=self.layers,
            heads=self.heads,
            bases=bases,
            nulls=flags,
            norm=norm,
            ropes=self.ropes,
            source=source,
            tokens=self.tokens,
        )
