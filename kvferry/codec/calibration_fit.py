"""From captured pages of a layer group to its calibration."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.basis import eigenbasis
from kvferry.codec.calibration_bundle import (
    JOINER,
    BundleCalibration,
    StreamPart,
    bundle_calibration,
    part_weights,
)
from kvferry.codec.calibration_group import GroupCalibration
from kvferry.codec.covariance import CovarianceAccumulator, Float64Array
from kvferry.codec.importance import ImportanceSums
from kvferry.codec.rope import RopeSpec
from kvferry.codec.rows import page_rows
from kvferry.errors import ConfigError, UnsupportedTensorError
from kvferry.proto.keys import SINK_TOKENS

MAX_GROUP_WIDTH = 4096
DEFAULT_MAX_RANK = 2048


def layer_groups(
    layers: int, kv_heads: int, head_dim: int, max_width: int = MAX_GROUP_WIDTH
) -> list[tuple[int, int]]:
    """Equal runs of layers whose width p is at most ``max_width``, at least one layer.

    Cut by absolute layer index, so they do not depend on which machine holds what.
    Raises: ConfigError for counts below 1.
    """
    for name, value in (("layers", layers), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if value < 1:
            raise ConfigError(name, value, "at least 1")
    longest = max(1, max_width // (kv_heads * head_dim))
    count = -(-layers // longest)
    ends = [layers * i // count for i in range(count + 1)]
    return list(itertools.pairwise(ends))


class GroupAccumulator:
    """Collects what `fit_group` needs from pages of one layer group.

    Args:
        ropes: rotated stream -> one spec per layer of the group.
        joint: streams are coded together; else each by itself.
    """

    def __init__(
        self,
        *,
        model_id: bytes,
        layers: tuple[int, int],
        heads: tuple[int, int],
        ropes: Mapping[str, Sequence[RopeSpec]],
        joint: bool = True,
    ) -> None:
        self.model_id = model_id
        self.layers = layers
        self.heads = heads
        self.ropes = {name: tuple(specs) for name, specs in ropes.items()}
        self.joint = joint
        self._bundles: dict[str, CovarianceAccumulator] = {}
        self._importance: dict[str, ImportanceSums] = {}
        self._shapes: dict[str, tuple[int, int]] = {}

    @classmethod
    def like(cls, old: GroupCalibration) -> Self:
        """Empty, for other pages of the group that ``old`` is a calibration of."""
        return cls(
            model_id=old.model_id,
            layers=old.layers,
            heads=old.heads,
            ropes=old.ropes,
            joint=any(len(bundle.parts) > 1 for bundle in old.bundles.values()),
        )

    @property
    def bundles(self) -> Mapping[str, CovarianceAccumulator]:
        """Bundle name -> rows seen so far, RoPE undone."""
        return self._bundles

    @property
    def importance(self) -> Mapping[str, ImportanceSums]:
        """Bundle name -> how rows went with the importance of their tokens."""
        return self._importance

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Stream name -> (heads, dim)."""
        return self._shapes

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return max((seen.count for seen in self._bundles.values()), default=0)

    def variances(self) -> dict[str, float]:
        """Stream name -> mean variance of a value."""
        found = {}
        for bundle, seen in self._bundles.items():
            variance = np.diag(seen.covariance())
            at = 0
            for name in bundle.split(JOINER):
                width = (self.layers[1] - self.layers[0]) * math.prod(self._shapes[name])
                found[name] = float(variance[at : at + width].mean())
                at += width
        return found

    def add(self, page: PageTensors, importance: Float64Array | None = None) -> None:
        """Take in a page of any length that covers the group's layers and heads.

        The first tokens of a sequence are left out: codecs store them exactly.

        Args:
            importance: (tokens of the page,), of a page that is a whole sequence; NaN
                where it is not known.
        Raises: UnsupportedTensorError.
        """
        self._take(page, importance, fitted=True)

    def weigh(self, page: PageTensors, importance: Float64Array) -> None:
        """Only learn how rows go with the importance of tokens. As `add`."""
        self._take(page, importance, fitted=False)

    def _take(self, page: PageTensors, importance: Float64Array | None, *, fitted: bool) -> None:
        if page.layers != self.layers:
            page = page.cut_layers(self.layers)
        if page.heads != self.heads:
            page = page.cut_heads(self.heads)
        if not set(self.ropes) <= set(page.streams):
            raise UnsupportedTensorError(min(set(self.ropes) - set(page.streams)), "is missing")
        first = max(page.tokens[0], SINK_TOKENS)
        if first >= page.tokens[1]:
            return
        for name, stream in page.streams.items():
            shape = stream.data.shape[1], stream.data.shape[3]
            if self._shapes.setdefault(name, shape) != shape:
                raise UnsupportedTensorError(name, f"heads x dim {shape} differ between pages")
        for names in self._bundled(sorted(page.streams)):
            rows = page_rows(page, names, self.ropes, first)
            bundle = JOINER.join(names)
            sums = self._importance.setdefault(bundle, ImportanceSums(rows.shape[1]))
            if fitted:
                if bundle not in self._bundles:
                    self._bundles[bundle] = CovarianceAccumulator(rows.shape[1])
                self._bundles[bundle].add(rows)
            if importance is not None:
                given = np.asarray(importance[first - page.tokens[0] :], dtype=np.float64)
                known = np.isfinite(given)
                sums.add(rows[known], given[known])

    def _bundled(self, names: Sequence[str]) -> list[Sequence[str]]:
        return [names] if self.joint else [[name] for name in names]

    def merge(self, other: "GroupAccumulator") -> None:
        """Take in what another rank saw of the same group. Raises: UnsupportedTensorError."""
        mine = (self.model_id, self.layers, self.heads, self.ropes, self.joint)
        if mine != (other.model_id, other.layers, other.heads, other.ropes, other.joint):
            raise UnsupportedTensorError("*", "the other samples are of another group")
        for name, shape in other.shapes.items():
            if self._shapes.setdefault(name, shape) != shape:
                raise UnsupportedTensorError(name, f"heads x dim {shape} differ")
        for name, seen in other.bundles.items():
            self._bundles.setdefault(name, CovarianceAccumulator(seen.width)).merge(seen)
            sums = self._importance.setdefault(name, ImportanceSums(seen.width))
            sums.merge(other.importance[name])

    def calibration(
        self, bundles: Mapping[str, BundleCalibration], source: str
    ) -> GroupCalibration:
        """The group's calibration out of ``bundles`` that were fitted to what was seen.

        Args:
            bundles: of all streams, or of some.
            source: where the text came from, for people.
        """
        streams = {part.name for bundle in bundles.values() for part in bundle.parts}
        return GroupCalibration(
            model_id=self.model_id,
            layers=self.layers,
            heads=self.heads,
            bundles=bundles,
            ropes={name: specs for name, specs in self.ropes.items() if name in streams},
            source=source,
            tokens=self.tokens,
        )


def fit_group(
    seen: GroupAccumulator,
    *,
    weights: Mapping[str, FloatArray] | None = None,
    max_rank: int = DEFAULT_MAX_RANK,
    source: str = "",
) -> GroupCalibration:
    """Eigenbases of a group.

    Args:
        weights: stream name -> (layers, heads, dim, dim) float32; a stream that is
            missing has identity weights.
        max_rank: directions kept per bundle.
        source: where the text came from, for people.
    Raises: UnsupportedTensorError: too few tokens seen.
    """
    bundles = {}
    for name, accumulator in seen.bundles.items():
        parts = [
            StreamPart(
                name=stream,
                heads=seen.shapes[stream][0],
                dim=seen.shapes[stream][1],
                weight=_contiguous((weights or {}).get(stream)),
            )
            for stream in name.split(JOINER)
        ]
        at = part_weights(parts, seen.layers[1] - seen.layers[0])
        basis = eigenbasis(accumulator, max_rank, at)
        basis = replace(basis, importance=seen.importance[name].fit(basis, at))
        bundles[name] = bundle_calibration(parts, basis)
    return seen.calibration(bundles, source)


def _contiguous(weight: FloatArray | None) -> FloatArray | None:
    return None if weight is None else np.ascontiguousarray(weight, dtype=np.float32)
