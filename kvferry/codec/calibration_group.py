"""The calibration of one layer group: bases, rope, identity, and how it is cut."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvferry.codec import calibration_format as fmt
from kvferry.codec.calibration_stream import MAX_WIDTH, StreamCalibration
from kvferry.codec.rope import RopeSpec, combined_fingerprint
from kvferry.codec.transform import Products
from kvferry.errors import CalibrationCorruptError, ConfigError
from kvferry.proto.container import DEFAULT_LIMITS, Limits
from kvferry.proto.keys import DIGEST_BYTES, MAX_HEADS, MAX_LAYERS, BlobKey


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
