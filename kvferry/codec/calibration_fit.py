"""From captured pages of a layer group to its calibration."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.calibration_group import GroupCalibration
from kvferry.codec.calibration_stream import stream_calibration
from kvferry.codec.rope import RopeSpec
from kvferry.codec.rows import page_rows
from kvferry.codec.transform import CovarianceAccumulator, eigenbasis
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
    """Collects what `fit_group` needs from pages of one layer group."""

    def __init__(
        self,
        *,
        model_id: bytes,
        layers: tuple[int, int],
        heads: tuple[int, int],
        ropes: Mapping[str, Sequence[RopeSpec]],
    ) -> None:
        """``ropes``: rotated stream -> one spec per layer of the group."""
        self.model_id = model_id
        self.layers = layers
        self.heads = heads
        self.ropes = {name: tuple(specs) for name, specs in ropes.items()}
        self._streams: dict[str, CovarianceAccumulator] = {}
        self._shapes: dict[str, tuple[int, int]] = {}

    @property
    def streams(self) -> Mapping[str, CovarianceAccumulator]:
        """Stream name -> rows seen so far, RoPE undone."""
        return self._streams

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Stream name -> (heads, dim)."""
        return self._shapes

    def add(self, page: PageTensors) -> None:
        """Take in a page of any length that covers the group's layers and heads.

        The first tokens of a sequence are left out: codecs store them exactly.
        Raises: UnsupportedTensorError.
        """
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
            rows = page_rows(page, name, self.ropes.get(name), first)
            if name not in self._streams:
                self._streams[name] = CovarianceAccumulator(rows.shape[1])
            self._streams[name].add(rows)

    def merge(self, other: "GroupAccumulator") -> None:
        """Take in what another rank saw of the same group. Raises: UnsupportedTensorError."""
        mine = (self.model_id, self.layers, self.heads, self.ropes)
        if mine != (other.model_id, other.layers, other.heads, other.ropes):
            raise UnsupportedTensorError("*", "the other samples are of another group")
        for name, seen in other.streams.items():
            shape = other.shapes[name]
            if self._shapes.setdefault(name, shape) != shape:
                raise UnsupportedTensorError(name, f"heads x dim {shape} differ")
            self._streams.setdefault(name, CovarianceAccumulator(seen.width)).merge(seen)


def fit_group(
    seen: GroupAccumulator,
    *,
    weights: Mapping[str, FloatArray] | None = None,
    max_rank: int = DEFAULT_MAX_RANK,
    source: str = "",
) -> GroupCalibration:
    """Eigenbases of all streams of a group.

    Args:
        weights: stream name -> (layers, heads, dim, dim) float32; a stream that is
            missing has identity weights.
        max_rank: directions kept per stream.
        source: where the text came from, for people.
    Raises: UnsupportedTensorError: too few tokens seen.
    """
    streams = {}
    for name, accumulator in seen.streams.items():
        weight = (weights or {}).get(name)
        if weight is not None:
            weight = np.ascontiguousarray(weight, dtype=np.float32)
        basis = eigenbasis(accumulator, max_rank, weight)
        streams[name] = stream_calibration(name, *seen.shapes[name], basis, weight)
    return GroupCalibration(
        model_id=seen.model_id,
        layers=seen.layers,
        heads=seen.heads,
        streams=streams,
        ropes=seen.ropes,
        source=source,
        tokens=max((s.count for s in seen.streams.values()), default=0),
    )
