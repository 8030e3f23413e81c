"""What calibration has seen of a text so far: small, of fixed size, kept and loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.calibration import GroupAccumulator, layer_groups
from kvferry.codec.calibration_bundle import JOINER
from kvferry.codec.covariance import CovarianceAccumulator, SavedLayout, SavedTensors
from kvferry.codec.importance import ImportanceSums
from kvferry.codec.lab.fisher import Fisher, FisherPass
from kvferry.codec.mlx.shape import ModelShape
from kvferry.codec.rope import RopeSpec
from kvferry.errors import CalibrationCorruptError

_COVERED = "covered"
_CHOOSING = "index_"


class SeenGroup(GroupAccumulator):
    """A layer group's accumulator whose state can be kept."""

    def layout(self, shape: ModelShape) -> SavedLayout:
        """Names, shapes and dtypes of `tensors` once something was added."""
        count = self.layers[1] - self.layers[0]
        found: SavedLayout = {}
        for names in self._bundled(sorted(shape.streams)):
            streams = [shape.streams[name] for name in names]
            width = count * sum(stream.heads * stream.dim for stream in streams)
            parts = CovarianceAccumulator.state_layout(width) | {
                "importance": ((width,), "<f8"),
                "weighed": ((1,), "<i8"),
            }
            bundle = JOINER.join(names)
            found |= {self._name(bundle, part): kind for part, kind in parts.items()}
        return found

    def tensors(self) -> SavedTensors:
        """Views of the state; empty before anything was added."""
        found: dict[str, npt.NDArray[Any]] = {}
        for name, covariance in self._bundles.items():
            sums = self._importance[name]
            parts = dict(covariance.state)
            parts["importance"] = sums.products
            parts["weighed"] = np.array([sums.count], dtype="<i8")
            found |= {self._name(name, part): value for part, value in parts.items()}
        return found

    def load(self, tensors: SavedTensors, shape: ModelShape) -> None:
        """Take over what `tensors` gave. Raises: KeyError."""
        bundles, importance = {}, {}
        for names in self._bundled(sorted(shape.streams)):
            bundle = JOINER.join(names)
            parts = {
                part: tensors[self._name(bundle, part)]
                for part in CovarianceAccumulator.state_layout(1)
            }
            covariance = bundles[bundle] = CovarianceAccumulator.of_state(parts)
            sums = importance[bundle] = ImportanceSums(covariance.width)
            sums.products = tensors[self._name(bundle, "importance")]
            sums.count = int(tensors[self._name(bundle, "weighed")][0])
        self._bundles, self._importance = bundles, importance
        self._shapes = {name: (s.heads, s.dim) for name, s in shape.streams.items()}

    def _name(self, bundle: str, part: str) -> str:
        where = f"layers {self.layers[0]}-{self.layers[1]}"
        return f"{where}/{part}" if self.joint else f"{where}/{bundle}/{part}"


class Gathered:
    """Covariances of all layer groups and Fisher sums; the text itself is not kept.

    Attributes:
        covered: tokens of the text that are in it.
        groups: one accumulator per layer group.
        fisher: sums over backward passes.
    """

    def __init__(
        self,
        model_id: bytes,
        shape: ModelShape,
        ropes: Mapping[str, Sequence[RopeSpec]],
        layers: tuple[int, int] | None = None,
    ) -> None:
        """``layers``: only groups that lie wholly within; all groups if None."""
        self.shape = shape
        self.covered = 0
        first, last = layers or (0, shape.layers)
        spans = layer_groups(shape.layers, shape.kv_heads, shape.head_dim)
        self.fisher = Fisher(ropes, groups=spans, latent=shape.latent)
        self.groups = [
            SeenGroup(
                model_id=model_id,
                layers=(a, b),
                heads=(0, shape.kv_heads),
                ropes={name: tuple(specs[a:b]) for name, specs in ropes.items()},
            )
            for a, b in spans
            if first <= a and b <= last
        ]

    def add(self, pages: Sequence[PageTensors], found: FisherPass | None, to: int) -> None:
        """Take in a sequence's pages (one per group) and its backward pass."""
        for group, page in zip(self.groups, pages, strict=True):
            group.add(page, None if found is None else found.importance(group.layers))
        if found is not None:
            self.fisher.take(found)
        self.covered = to

    def weigh(self, page: PageTensors, found: FisherPass) -> None:
        """Take in a backward pass of a sequence whose pages come by themselves."""
        self.fisher.take(found)
        for group in list(self.groups):
            group.weigh(page, found.importance(group.layers))

    def weights(self, seen: GroupAccumulator, ridge: float) -> dict[str, FloatArray] | None:
        """See `Fisher.weights`; None where no pass was taken in.

        What only chooses (the keys of a sparse attention's indexer) has no gradient. It is
        taken to matter as much, all in all, as another stream does on average.
        """
        if not self.fisher.passes:
            return None
        made = self.fisher.weights(seen.layers, ridge)
        variances = seen.variances()
        felt = [
            float(np.square(weight).sum(axis=-2).mean()) * variances[name]
            for name, weight in made.items()
            if not name.startswith(_CHOOSING)
        ]
        for name, weight in made.items():
            if name.startswith(_CHOOSING):
                scale = np.sqrt(np.mean(felt) / variances[name]) if variances[name] else 1.0
                weight[...] = scale * np.eye(weight.shape[-1], dtype=np.float32)
        return made

    def layout(self) -> SavedLayout:
        """Names, shapes and dtypes of all tensors that a kept state may have."""
        found: SavedLayout = {_COVERED: ((2,), "<i8")}
        for group in self.groups:
            found |= group.layout(self.shape)
        for name, stream in self.shape.streams.items():
            square = (self.shape.layers, stream.heads, stream.dim, stream.dim)
            found[f"fisher/{name}"] = (square, "<f8")
        return found

    @property
    def most_bytes(self) -> int:
        """What it will hold once something was added; no more, whatever is added."""
        sizes = (
            np.prod(s, dtype=np.int64) * np.dtype(k).itemsize for s, k in self.layout().values()
        )
        return int(sum(sizes))

    def tensors(self) -> SavedTensors:
        """Views of the whole state."""
        found: dict[str, npt.NDArray[Any]] = {
            _COVERED: np.array([self.covered, self.fisher.passes], dtype="<i8")
        }
        for group in self.groups:
            found |= group.tensors()
        return found | {f"fisher/{name}": value for name, value in self.fisher.sums.items()}

    def load(self, tensors: SavedTensors) -> None:
        """Take over a kept state whose layout was checked.

        Raises: CalibrationCorruptError: tensors are missing.
        """
        try:
            for group in self.groups:
                group.load(tensors, self.shape)
            covered, passes = (int(n) for n in tensors[_COVERED])
            if passes:
                self.fisher.sums = {n: tensors[f"fisher/{n}"] for n in self.shape.streams}
        except KeyError as exc:
            raise CalibrationCorruptError("checkpoint", f"tensor {exc} is missing") from exc
        self.covered, self.fisher.passes = covered, passes
