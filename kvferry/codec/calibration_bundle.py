"""The basis of streams that are coded together, within one layer group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.basis import Basis, Weights, cut_basis, row_weight
from kvferry.codec.importance import Predictor, predictor
from kvferry.codec.transform import Fold, Products, fold
from kvferry.errors import CalibrationCorruptError

MAX_WIDTH = 1 << 17
JOINER = "+"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamPart:
    """One stream within a bundle.

    Attributes:
        name: "k", "v", ...
        heads, dim: of this stream; MLA's streams have one head.
        weight: (layers, heads, dim, dim) float32, or None for identity.
    """

    name: str
    heads: int
    dim: int
    weight: FloatArray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BundleCalibration:
    """Basis of the streams of one layer group that are coded together.

    A row holds one token's values, part after part, each ordered (layer, head, dim).

    Attributes:
        parts: the streams, by name.
        mean: (p,) float32, of the weighted rows; p = sum of layers x heads x dim.
        basis: (p, r) float16 or float32, orthonormal columns by falling variance.
        sigma: (r,) float32, standard deviations of the coefficients.
        importance: (n,) float32, n <= r, or None; see `kvferry.codec.importance`.
        products: where its matrix products run; no part of what is stored.
    """

    parts: tuple[StreamPart, ...]
    mean: FloatArray
    basis: npt.NDArray[np.float16] | FloatArray
    sigma: FloatArray
    importance: FloatArray | None = None
    products: Products | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CalibrationCorruptError(f"streams {self.name!r}", problem)

    def _problem(self) -> str:
        if self.basis.ndim != 2 or min(self.basis.shape) < 1:
            return f"basis of shape {self.basis.shape}"
        width, rank = self.basis.shape
        names = [part.name for part in self.parts]
        if not names or names != sorted(set(names)) or any(JOINER in name for name in names):
            return "its streams are not in order"
        if any(part.heads < 1 or part.dim < 1 for part in self.parts):
            return "a stream without heads or dims"
        if width % self.layer_width or width > MAX_WIDTH:
            return f"width {width} for {self.layer_width} values a layer"
        if rank > width or self.mean.shape != (width,) or self.sigma.shape != (rank,):
            return "mean, basis and sigma differ in size"
        for part in self.parts:
            wanted = (self.layers, part.heads, part.dim, part.dim)
            if part.weight is not None and part.weight.shape != wanted:
                return f"weight of {part.name!r} of shape {part.weight.shape}"
        if self.importance is not None and not (
            self.importance.ndim == 1 and 1 <= len(self.importance) <= rank
        ):
            return f"importance of shape {self.importance.shape}"
        floats = [self.mean, self.sigma, self.importance, *(part.weight for part in self.parts)]
        if any(value is not None and value.dtype != np.float32 for value in floats):
            return "a tensor that is not float32"
        if self.basis.dtype not in (np.float16, np.float32):
            return f"basis of {self.basis.dtype}"
        if (self.sigma < 0).any() or (np.diff(self.sigma) > 0).any():
            return "sigma does not fall"
        return ""

    @property
    def name(self) -> str:
        """Names of the streams, joined."""
        return JOINER.join(part.name for part in self.parts)

    @property
    def layer_width(self) -> int:
        """Values of one token in one layer."""
        return sum(part.heads * part.dim for part in self.parts)

    @property
    def width(self) -> int:
        """p, values of one token."""
        return int(self.basis.shape[0])

    @property
    def rank(self) -> int:
        """Directions kept."""
        return int(self.basis.shape[1])

    @property
    def layers(self) -> int:
        """How many layers the rows hold."""
        return self.width // self.layer_width

    @cached_property
    def rows(self) -> Mapping[str, slice]:
        """Stream name -> where its values lie in a row."""
        return part_rows(self.parts, self.layers)

    def rows_of(self, name: str, layers: slice) -> slice:
        """Where some layers of one stream lie in a row (indices within the bundle)."""
        part = next(part for part in self.parts if part.name == name)
        first, each = self.rows[name].start, part.heads * part.dim
        return slice(first + layers.start * each, first + layers.stop * each)

    @cached_property
    def weights(self) -> Weights:
        """The parts' weights, at their rows."""
        return part_weights(self.parts, self.layers)

    @cached_property
    def fold(self) -> Fold:
        """Weights, basis and mean as one float32 matrix each way; kept."""
        return fold(self._as_basis(), self.weights, self.products)

    @cached_property
    def predictor(self) -> Predictor | None:
        """Of the importance of tokens; made once and kept."""
        if self.importance is None:
            return None
        return predictor(self.fold.forward, self.sigma, self.importance)

    def _as_basis(self) -> Basis:
        return Basis(self.mean, self.basis, self.sigma, self.importance)

    def cut(self, layers: slice, heads: slice, whole_heads: int) -> "BundleCalibration":
        """Only these layers and heads (indices within the group).

        Args:
            whole_heads: heads of the group; a stream with another number stays whole.
        """
        parts, index = [], []
        for part in self.parts:
            kept = heads if part.heads == whole_heads else slice(None)
            shape = (self.layers, part.heads, part.dim)
            at = np.arange(self.rows[part.name].start, self.rows[part.name].stop).reshape(shape)
            rows = at[layers, kept]
            index.append(rows.reshape(-1))
            weight = part.weight
            if weight is not None:
                weight = np.ascontiguousarray(weight[layers, kept])
            parts.append(replace(part, heads=rows.shape[1], weight=weight))
        made = bundle_calibration(parts, cut_basis(self._as_basis(), np.concatenate(index)))
        return replace(made, products=self.products)


def part_rows(parts: Sequence[StreamPart], layers: int) -> dict[str, slice]:
    """Stream name -> where its values lie in a row."""
    found, at = {}, 0
    for part in parts:
        end = at + layers * part.heads * part.dim
        found[part.name] = slice(at, end)
        at = end
    return found


def part_weights(parts: Sequence[StreamPart], layers: int) -> Weights:
    """The weights of those parts that have one, at their rows."""
    rows = part_rows(parts, layers)
    return [row_weight(p.weight, rows[p.name].start) for p in parts if p.weight is not None]


def bundle_calibration(parts: Sequence[StreamPart], basis: Basis) -> BundleCalibration:
    """A bundle as it is stored.

    float16 is enough for the basis: its rounding adds 1e-7 of a page's energy, a step
    that suits any use thousands of times that.
    """
    return BundleCalibration(
        parts=tuple(parts),
        mean=basis.mean,
        basis=basis.vectors.astype(np.float16),
        sigma=np.minimum.accumulate(basis.sigma),
        importance=basis.importance,
    )
