"""What `lowrank` learned about a model: a basis per layer, head and stream, K and V both.

It is a `GroupCalibration` without bundles, so that stores, policies and cuts treat it as
any other; all directions are held, so that one calibration serves every rank. A cut takes
slices, and is the same bytes on every machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvferry.codec import calibration_format as fmt
from kvferry.codec.calibration_bundle import MAX_WIDTH, BundleCalibration, StreamPart
from kvferry.codec.calibration_group import GroupCalibration, check_read, read_about, within
from kvferry.codec.lowrank_heads import HeadBasis
from kvferry.errors import CalibrationCorruptError
from kvferry.proto.container import DEFAULT_LIMITS, Limits
from kvferry.proto.keys import MAX_HEADS, BlobKey

STREAMS = ("k", "v")
LAYER_NORM, RMS_NORM, UNKNOWN_NORM = "layernorm", "rmsnorm", "unknown"
NORMS = (LAYER_NORM, RMS_NORM, UNKNOWN_NORM)
_FIELDS = ("mean", "vectors", "variances")

Flags = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankCalibration(GroupCalibration):
    """Bases of every head of a range of layers.

    Attributes:
        bases: "k" and "v" -> basis of (layers, heads, dim, dim), RoPE undone.
        nulls: stream -> (layers, heads) float32, 1 where the head's last direction is one
            that the norm before attention leaves empty (`kvferry.codec.lowrank_null`);
            a stream without any may be missing.
        norm: what the norm before attention is, one of `NORMS`.
    """

    bundles: Mapping[str, BundleCalibration] = field(default_factory=dict)
    bases: Mapping[str, HeadBasis]
    nulls: Mapping[str, Flags] = field(default_factory=dict)
    norm: str = UNKNOWN_NORM

    def _problem(self) -> str:
        count, heads = self.layers[1] - self.layers[0], self.heads[1] - self.heads[0]
        if self.bundles or tuple(sorted(self.bases)) != STREAMS:
            return "its bases are not of K and V"
        if self.norm not in NORMS:
            return f"norm {self.norm[:16]!r} is unknown"
        for name, basis in self.bases.items():
            if basis.vectors.shape != (count, heads, basis.dim, basis.dim):
                return f"basis of {name!r} of shape {basis.vectors.shape}"
            if (basis.variances < 0).any():
                return f"a variance of {name!r} is negative"
        for name, null in self.nulls.items():
            if name not in self.bases or null.shape != (count, heads):
                return f"null directions of {name!r} have another shape"
            if null.dtype != np.float32 or not np.isin(null, (0, 1)).all():
                return f"null directions of {name!r} are no flags"
        return super()._problem()

    def _parts(self) -> list[StreamPart]:
        return [
            StreamPart(name=name, heads=basis.vectors.shape[1], dim=basis.dim)
            for name, basis in sorted(self.bases.items())
        ]

    def _framed(self) -> fmt.Framed:
        tensors: dict[str, npt.NDArray[np.floating]] = {}
        for name, basis in self.bases.items():
            for part in _FIELDS:
                tensors[f"{name}/{part}"] = np.ascontiguousarray(getattr(basis, part))
        for name, null in self.nulls.items():
            tensors[f"{name}/null"] = np.ascontiguousarray(null)
        return fmt.frame(self._description(), tensors)

    def _description(self) -> dict[str, object]:
        return self._about() | {
            "kind": "lowrank",
            "norm": self.norm,
            "streams": [
                {
                    "name": part.name,
                    "heads": part.heads,
                    "dim": part.dim,
                    "null": part.name in self.nulls,
                }
                for part in self._parts()
            ],
        }

    def empty(self, name: str, layers: slice = slice(None)) -> bool:
        """Whether every head of a stream's ``layers`` has a direction that the norm empties."""
        null = self.nulls.get(name)
        return null is not None and bool(null[layers].all())

    def cut(self, layers: tuple[int, int], heads: tuple[int, int]) -> "LowRankCalibration":
        """Of just these layers and heads. Raises: ConfigError for ranges outside this one's."""
        if (layers, heads) == (self.layers, self.heads):
            return self
        part = within("layers", layers, self.layers), within("heads", heads, self.heads)
        return replace(
            self,
            layers=layers,
            heads=heads,
            bases={name: basis[part] for name, basis in self.bases.items()},
            nulls={name: null[part] for name, null in self.nulls.items()},
            ropes={name: specs[part[0]] for name, specs in self.ropes.items()},
            parent=self.id,
        )

    def to_blob(self) -> tuple[BlobKey, bytes]:
        """As `GroupCalibration.to_blob`, with codec name "lowrank"."""
        framed = self._framed()
        data = fmt.to_blob(framed, fmt.LOWRANK_NAME, self.model_id, self.layers, self.heads)
        return fmt.key_for(framed.id), data

    @classmethod
    def from_blob(cls, data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> Self:
        """Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError."""
        opened = fmt.open_blob(data, fmt.LOWRANK_NAME, limits)
        fields, tensors = opened.fields, dict(opened.tensors)
        bases, nulls = {}, {}
        for described in fields.objects("streams"):
            name = described.text("name")
            bases[name] = _basis(described, name, tensors)
            if described.flag("null"):
                nulls[name] = _take(described, f"{name}/null", tensors)
        found = cls(bases=bases, nulls=nulls, norm=fields.text("norm"), **read_about(fields))
        check_read(found, opened, tensors)
        return found


def _take(described: fmt.Fields, name: str, tensors: dict[str, Any]) -> Any:
    value = tensors.pop(name, None)  # shapes and dtypes are checked in the classes
    if value is None:
        raise CalibrationCorruptError(described.where, f"tensor {name!r} is missing")
    return value


def _basis(described: fmt.Fields, name: str, tensors: dict[str, Any]) -> HeadBasis:
    heads, dim = described.integer("heads", 1, MAX_HEADS), described.integer("dim", 1, MAX_WIDTH)
    found = HeadBasis(**{part: _take(described, f"{name}/{part}", tensors) for part in _FIELDS})
    if found.vectors.shape[1:] != (heads, dim, dim):
        raise CalibrationCorruptError(described.where, f"basis of {name!r} has another shape")
    return found
