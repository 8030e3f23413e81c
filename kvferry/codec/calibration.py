"""What the transform codec learned about a model, and how it is stored, cut and found.

A `GroupCalibration` covers one layer group (or a cut of one) and is what blobs name by
id. A `CalibrationSet` lists the groups of a model with the measured rate-distortion
curve. Both are stored as containers of kind calibration, addressed by their content.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.rope import RopeSpec
from kvferry.codec.transform import CovarianceAccumulator, Fold
from kvferry.errors import ConfigError
from kvferry.proto.container import DEFAULT_LIMITS, Limits
from kvferry.proto.keys import BlobKey

MAX_GROUP_WIDTH = 4096
DEFAULT_MAX_RANK = 1536


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


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamCalibration:
    """Basis of one stream of one layer group.

    Attributes:
        name: "k", "v", ...
        heads, dim: of this stream; MLA's streams have one head.
        mean: (p,) float32, of the weighted rows.
        basis: (p, r) float16 or float32, orthonormal columns by falling variance.
        sigma: (r,) float32, standard deviations of the coefficients.
        weight: (layers, heads, dim, dim) float32, or None for identity.
    """

    name: str
    heads: int
    dim: int
    mean: FloatArray
    basis: FloatArray
    sigma: FloatArray
    weight: FloatArray | None = None

    @property
    def width(self) -> int:
        """p = layers x heads x dim."""
        return int(self.basis.shape[0])

    @property
    def rank(self) -> int:
        """Directions kept."""
        return int(self.basis.shape[1])

    @cached_property
    def fold(self) -> Fold:
        """Weight, basis and mean folded into one float32 matrix each way, kept."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupCalibration:
    """Calibration of one layer group, or of a part of one.

    Attributes:
        model_id: 32 bytes.
        layers, heads: absolute, half-open: exactly those of the blobs coded with it.
        streams: name -> basis.
        ropes: name of a rotated stream -> one `RopeSpec` per layer.
        parent: id of the calibration that this one was cut from; empty for a fitted one.
        source: where the calibration text came from.
        tokens: how many tokens it saw.
    """

    model_id: bytes
    layers: tuple[int, int]
    heads: tuple[int, int]
    streams: Mapping[str, StreamCalibration]
    ropes: Mapping[str, tuple[RopeSpec, ...]]
    parent: bytes = b""
    source: str = ""
    tokens: int = 0

    @cached_property
    def id(self) -> bytes:
        """32 bytes: BLAKE3 of description and tensors, as `to_blob` writes them."""
        raise NotImplementedError

    def rope_fingerprint(self) -> bytes:
        """One fingerprint for all layers, as blobs carry it; empty without rotated streams."""
        raise NotImplementedError

    def cut(self, layers: tuple[int, int], heads: tuple[int, int]) -> "GroupCalibration":
        """The calibration of just these layers and heads, without the model.

        The basis is the SVD of the kept rows of (basis x sigma). Eigenvectors differ
        between machines, so a reader fetches a cut by the id that the blob names.
        Equal ranges return ``self``. Raises: ConfigError for ranges outside this group's.
        """
        raise NotImplementedError

    def to_blob(self) -> tuple[BlobKey, bytes]:
        """Container of kind calibration: "description" (JSON) and "tensors" (safetensors)."""
        raise NotImplementedError

    @classmethod
    def from_blob(
        cls, data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS
    ) -> "GroupCalibration":
        """Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError."""
        raise NotImplementedError


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
        raise NotImplementedError

    @property
    def streams(self) -> Mapping[str, CovarianceAccumulator]:
        """Stream name -> rows seen so far, RoPE undone."""
        raise NotImplementedError

    def add(self, page: PageTensors) -> None:
        """Take in a page of any length that covers the group's layers and heads.

        The first tokens of a sequence are left out: codecs store them exactly.
        Raises: UnsupportedTensorError.
        """
        raise NotImplementedError

    def merge(self, other: "GroupAccumulator") -> None:
        """Take in what another rank saw of the same group."""
        raise NotImplementedError


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
    """
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One measured point: step, stored bits per value, mean KL in nats."""

    step: float
    bits_per_value: float
    kl: float


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """A group of a `CalibrationSet`: its calibration's id and what it covers."""

    id: bytes
    layers: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """All groups of a model and what they were measured to cost.

    Attributes:
        groups: in layer order, covering all layers and heads.
        curve: by falling step; may be empty (not measured).
        text_source: where the calibration text came from.
        tokens: tokens of calibration text.
    """

    model_id: bytes
    model_layers: int
    model_heads: int
    groups: tuple[GroupEntry, ...]
    curve: tuple[CurvePoint, ...] = ()
    text_source: str = ""
    tokens: int = 0
    extra: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def id(self) -> bytes:
        """32 bytes: BLAKE3 of the description."""
        raise NotImplementedError

    def step_for_kl(self, target_kl: float) -> float:
        """Coarsest step whose predicted mean KL is at most ``target_kl`` nats.

        Interpolated on the measured curve (log-log), never beyond its ends.
        Raises: ConfigError: no curve, or no number above 0.
        """
        raise NotImplementedError

    def to_blob(self) -> tuple[BlobKey, bytes]:
        """Container of kind calibration with codec name "manifest"."""
        raise NotImplementedError

    @classmethod
    def from_blob(
        cls, data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS
    ) -> "CalibrationSet":
        """Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError."""
        raise NotImplementedError

    def save(self, folder: Path, groups: Sequence[GroupCalibration]) -> None:
        """Write ``calibration.json`` and one file a group, each atomically."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path) -> "tuple[CalibrationSet, list[GroupCalibration]]":
        """Read what `save` wrote. Raises: ConfigError (no such folder), CodecError."""
        raise NotImplementedError
