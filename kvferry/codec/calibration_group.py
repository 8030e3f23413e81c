"""The calibration of one layer group: bases, rope, identity, and how it is cut."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvferry.codec import calibration_format as fmt
from kvferry.codec.base import FloatArray
from kvferry.codec.rope import RopeSpec, combined_fingerprint
from kvferry.codec.transform import Basis, Fold, Products, cut_basis, fold
from kvferry.errors import CalibrationCorruptError, ConfigError
from kvferry.proto.container import DEFAULT_LIMITS, Limits
from kvferry.proto.keys import DIGEST_BYTES, MAX_HEADS, MAX_LAYERS, BlobKey

MAX_WIDTH = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamCalibration:
    """Basis of one stream of one layer group.

    Attributes:
        name: "k", "v", ...
        heads, dim: of this stream; MLA's streams have one head.
        mean: (p,) float32, of the weighted rows; p = layers x heads x dim.
        basis: (p, r) float16 or float32, orthonormal columns by falling variance.
        sigma: (r,) float32, standard deviations of the coefficients.
        weight: (layers, heads, dim, dim) float32, or None for identity.
        products: where its matrix products run; no part of what is stored.
    """

    name: str
    heads: int
    dim: int
    mean: FloatArray
    basis: npt.NDArray[np.float16] | FloatArray
    sigma: FloatArray
    weight: FloatArray | None = None
    products: Products | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CalibrationCorruptError(f"stream {self.name!r}", problem)

    def _problem(self) -> str:
        if self.basis.ndim != 2 or min(self.basis.shape) < 1:
            return f"basis of shape {self.basis.shape}"
        width, rank = self.basis.shape
        if self.heads < 1 or self.dim < 1 or width % (self.heads * self.dim) or width > MAX_WIDTH:
            return f"width {width} with {self.heads} heads of {self.dim}"
        if rank > width or self.mean.shape != (width,) or self.sigma.shape != (rank,):
            return "mean, basis and sigma differ in size"
        layers = width // (self.heads * self.dim)
        wanted = (layers, self.heads, self.dim, self.dim)
        if self.weight is not None and self.weight.shape != wanted:
            return f"weight of shape {self.weight.shape}"
        for name in ("mean", "sigma", "weight"):
            value = getattr(self, name)
            if value is not None and value.dtype != np.float32:
                return f"{name} of {value.dtype}"
        if self.basis.dtype not in (np.float16, np.float32):
            return f"basis of {self.basis.dtype}"
        if (self.sigma < 0).any() or (np.diff(self.sigma) > 0).any():
            return "sigma does not fall"
        return ""

    @property
    def width(self) -> int:
        """p = layers x heads x dim."""
        return int(self.basis.shape[0])

    @property
    def rank(self) -> int:
        """Directions kept."""
        return int(self.basis.shape[1])

    @property
    def layers(self) -> int:
        """How many layers the rows hold."""
        return self.width // (self.heads * self.dim)

    @cached_property
    def fold(self) -> Fold:
        """Weight, basis and mean as one float32 matrix each way; made once and kept."""
        return fold(self._float32_basis(), self.weight, self.products)

    def _float32_basis(self) -> Basis:
        return Basis(self.mean, self.basis.astype(np.float32), self.sigma)

    def cut(self, layers: slice, heads: slice) -> "StreamCalibration":
        """Only these layers and heads (indices within the stream)."""
        shape = (self.layers, self.heads, self.dim)
        index = np.arange(self.width).reshape(shape)[layers, heads]
        part = cut_basis(self._float32_basis(), index.reshape(-1))
        weight = None if self.weight is None else np.ascontiguousarray(self.weight[layers, heads])
        made = stream_calibration(self.name, index.shape[1], self.dim, part, weight)
        return replace(made, products=self.products)


def stream_calibration(
    name: str, heads: int, dim: int, basis: Basis, weight: FloatArray | None
) -> StreamCalibration:
    """A stream's calibration as it is stored.

    float16 is enough for the basis: its rounding adds 1e-7 of a page's energy, a step
    that suits any use thousands of times that.
    """
    return StreamCalibration(
        name=name,
        heads=heads,
        dim=dim,
        mean=basis.mean,
        basis=basis.vectors.astype(np.float16),
        sigma=np.minimum.accumulate(basis.sigma),
        weight=weight,
    )


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

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise CalibrationCorruptError(f"of layers {self.layers[0]}-{self.layers[1]}", problem)

    def _problem(self) -> str:
        count, heads = self.layers[1] - self.layers[0], self.heads[1] - self.heads[0]
        if len(self.model_id) != DIGEST_BYTES or len(self.parent) not in (0, DIGEST_BYTES):
            return "model id or parent is no digest"
        if self.layers[0] < 0 or count < 1 or self.layers[1] > MAX_LAYERS:
            return "layers are no range"
        if self.heads[0] < 0 or heads < 1 or self.heads[1] > MAX_HEADS:
            return "heads are no range"
        if not self.source.isprintable() or self.tokens < 0:
            return "source or tokens cannot be"
        if not self.streams or not set(self.ropes) <= set(self.streams):
            return "streams and ropes do not fit"
        for name, stream in self.streams.items():
            if stream.name != name or stream.layers != count or stream.heads not in (1, heads):
                return f"stream {name!r} has another shape than the group"
        for name, specs in self.ropes.items():
            if len(specs) != count or any(s.dims > self.streams[name].dim for s in specs):
                return f"rope of stream {name!r} does not fit"
        return ""

    def _framed(self) -> fmt.Framed:
        tensors: dict[str, npt.NDArray[np.floating]] = {}
        for name, stream in self.streams.items():
            for part in ("mean", "basis", "sigma", "weight"):
                value = getattr(stream, part)
                if value is not None:
                    tensors[f"{name}/{part}"] = np.ascontiguousarray(value)
        return fmt.frame(self._description(), tensors)

    def _description(self) -> dict[str, object]:
        distinct = sorted(
            {spec for specs in self.ropes.values() for spec in specs},
            key=lambda spec: spec.fingerprint(),
        )
        number = {spec: index for index, spec in enumerate(distinct)}
        return {
            "kind": "group",
            "model_id": self.model_id.hex(),
            "layers": list(self.layers),
            "heads": list(self.heads),
            "streams": [
                {"name": n, "heads": s.heads, "dim": s.dim, "weighted": s.weight is not None}
                for n, s in sorted(self.streams.items())
            ],
            "rope_specs": [spec.to_json() for spec in distinct],
            "ropes": {name: [number[s] for s in specs] for name, specs in self.ropes.items()},
            "parent": self.parent.hex(),
            "source": self.source,
            "tokens": self.tokens,
        }

    @cached_property
    def id(self) -> bytes:
        """32 bytes: BLAKE3 of description and tensors, as `to_blob` writes them."""
        return self._framed().id

    @cached_property
    def rope_fingerprint(self) -> bytes:
        """One fingerprint for all layers, as blobs carry it; empty without rotated streams."""
        return combined_fingerprint([s for _, specs in sorted(self.ropes.items()) for s in specs])

    @cached_property
    def layer_ropes(self) -> Mapping[int, frozenset[bytes]]:
        """Absolute layer -> fingerprints of the ropes that its streams were undone with."""
        known = {spec: spec.fingerprint() for specs in self.ropes.values() for spec in specs}
        return {
            layer: frozenset(known[specs[layer - self.layers[0]]] for specs in self.ropes.values())
            for layer in range(*self.layers)
        }

    def cut(self, layers: tuple[int, int], heads: tuple[int, int]) -> "GroupCalibration":
        """The calibration of just these layers and heads, without the model.

        The basis is the SVD of the kept rows of (basis x sigma). Eigenvectors differ
        between machines, so a reader fetches a cut by the id that the blob names.
        Equal ranges return ``self``. Raises: ConfigError for ranges outside this group's.
        """
        if (layers, heads) == (self.layers, self.heads):
            return self
        kept_layers = _within("layers", layers, self.layers)
        kept_heads = _within("heads", heads, self.heads)
        whole = self.heads[1] - self.heads[0]
        return GroupCalibration(
            model_id=self.model_id,
            layers=layers,
            heads=heads,
            streams={
                name: s.cut(kept_layers, kept_heads if s.heads == whole else slice(None))
                for name, s in self.streams.items()
            },
            ropes={name: specs[kept_layers] for name, specs in self.ropes.items()},
            parent=self.id,
            source=self.source,
            tokens=self.tokens,
        )

    def using(self, products: Products | None) -> "GroupCalibration":
        """The same calibration, by id too, with its matrix products run elsewhere."""
        streams = {name: replace(s, products=products) for name, s in self.streams.items()}
        return replace(self, streams=streams)

    def to_blob(self) -> tuple[BlobKey, bytes]:
        """Container of kind calibration: "description" (JSON) and "tensors" (safetensors)."""
        framed = self._framed()
        data = fmt.to_blob(framed, fmt.GROUP_NAME, self.model_id, self.layers, self.heads)
        return fmt.key_for(framed.id), data

    @classmethod
    def from_blob(
        cls, data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS
    ) -> "GroupCalibration":
        """Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError."""
        opened = fmt.open_blob(data, fmt.GROUP_NAME, limits)
        fields, tensors = opened.fields, dict(opened.tensors)
        specs = [RopeSpec.from_json(value) for value in fields.items("rope_specs")]
        found = cls(
            model_id=fields.digest("model_id"),
            layers=fields.range("layers"),
            heads=fields.range("heads"),
            streams={s.name: s for s in (_stream(f, tensors) for f in fields.objects("streams"))},
            ropes=_ropes(fields, specs),
            parent=fields.digest("parent", optional=True),
            source=fields.text("source"),
            tokens=fields.integer("tokens"),
        )
        fmt.check_header(opened, found.model_id, found.layers, found.heads)
        if tensors:
            raise CalibrationCorruptError(fields.where, f"unknown tensors {sorted(tensors)[:3]}")
        if found.id != opened.header.page_key:
            raise CalibrationCorruptError(fields.where, "is not written in canonical form")
        return found


def _within(what: str, part: tuple[int, int], whole: tuple[int, int]) -> slice:
    if not whole[0] <= part[0] < part[1] <= whole[1]:
        raise ConfigError(what, f"{part[0]}-{part[1]}", f"within {whole[0]}-{whole[1]}")
    return slice(part[0] - whole[0], part[1] - whole[0])


def _stream(fields: fmt.Fields, tensors: dict[str, npt.NDArray[np.floating]]) -> StreamCalibration:
    name = fields.text("name")
    parts = ["mean", "basis", "sigma"] + ["weight"] * fields.flag("weighted")
    arrays = {part: tensors.pop(f"{name}/{part}", None) for part in parts}
    for part, value in arrays.items():
        if value is None:
            raise CalibrationCorruptError(fields.where, f"tensor '{name}/{part}' is missing")
    return StreamCalibration(
        name=name,
        heads=fields.integer("heads", 1, MAX_HEADS),
        dim=fields.integer("dim", 1, MAX_WIDTH),
        **arrays,  # type: ignore[arg-type]  # shapes and dtypes are checked in the class
    )


def _ropes(fields: fmt.Fields, specs: list[RopeSpec]) -> dict[str, tuple[RopeSpec, ...]]:
    table = fmt.Fields.of(fields.where, fields.values.get("ropes"))
    ropes = {}
    for name in table.values:
        numbers = table.items(name)
        if any(type(n) is not int or not 0 <= n < len(specs) for n in numbers):
            raise table.fail(name)
        ropes[name] = tuple(specs[int(str(n))] for n in numbers)
    return ropes
