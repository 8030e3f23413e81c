"""The calibration of one layer group: bases, rope, identity, and how it is cut."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codec import calibration_format as fmt
from kvferry.codec.calibration_bundle import JOINER, MAX_WIDTH, BundleCalibration, StreamPart
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
        bundles: name -> basis; every stream is in one of them. `ferry` codes all streams
            of a group together, "k+v"; `kvtc` each by itself.
        ropes: name of a rotated stream -> one `RopeSpec` per layer.
        parent: id of the calibration that this one was cut from; empty for a fitted one.
        source: where the calibration text came from.
        tokens: how many tokens it saw.
    """

    model_id: bytes
    layers: tuple[int, int]
    heads: tuple[int, int]
    bundles: Mapping[str, BundleCalibration]
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
        parts = self._parts()
        if len({part.name for part in parts}) != len(parts) or not set(self.ropes) <= {
            part.name for part in parts
        }:
            return "streams and ropes do not fit"
        if not parts:
            return "it has no streams"
        for name, bundle in self.bundles.items():
            if bundle.name != name or bundle.layers != count:
                return f"streams {name!r} have another shape than the group"
        dims = {part.name: part.dim for part in parts}
        if any(part.heads not in (1, heads) for part in parts):
            return "a stream has other heads than the group"
        for name, specs in self.ropes.items():
            if len(specs) != count or any(s.dims > dims[name] for s in specs):
                return f"rope of stream {name!r} does not fit"
        return ""

    def _parts(self) -> list[StreamPart]:
        return [part for bundle in self.bundles.values() for part in bundle.parts]

    @cached_property
    def streams(self) -> Mapping[str, StreamPart]:
        """Stream name -> its shape and weights, whatever bundle it is in."""
        return {part.name: part for part in sorted(self._parts(), key=lambda part: part.name)}

    def _framed(self) -> fmt.Framed:
        tensors: dict[str, npt.NDArray[np.floating]] = {}
        for name, bundle in self.bundles.items():
            for field in ("mean", "basis", "sigma", "importance"):
                value = getattr(bundle, field)
                if value is not None:
                    tensors[f"{name}/{field}"] = np.ascontiguousarray(value)
            for part in bundle.parts:
                if part.weight is not None:
                    tensors[f"{name}/weight/{part.name}"] = np.ascontiguousarray(part.weight)
        return fmt.frame(self._description(), tensors)

    def _description(self) -> dict[str, object]:
        return self._about() | {
            "kind": "group",
            "bundles": [
                {
                    "streams": [
                        {
                            "name": part.name,
                            "heads": part.heads,
                            "dim": part.dim,
                            "weighted": part.weight is not None,
                        }
                        for part in bundle.parts
                    ],
                    "importance": bundle.importance is not None,
                }
                for _, bundle in sorted(self.bundles.items())
            ],
        }

    def _about(self) -> dict[str, object]:
        """What all kinds of calibrations of a layer group say of themselves."""
        distinct = sorted(
            {spec for specs in self.ropes.values() for spec in specs},
            key=lambda spec: spec.fingerprint(),
        )
        number = {spec: index for index, spec in enumerate(distinct)}
        return {
            "model_id": self.model_id.hex(),
            "layers": list(self.layers),
            "heads": list(self.heads),
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
        kept_layers = within("layers", layers, self.layers)
        kept_heads = within("heads", heads, self.heads)
        whole = self.heads[1] - self.heads[0]
        return GroupCalibration(
            model_id=self.model_id,
            layers=layers,
            heads=heads,
            bundles={
                name: bundle.cut(kept_layers, kept_heads, whole)
                for name, bundle in self.bundles.items()
            },
            ropes={name: specs[kept_layers] for name, specs in self.ropes.items()},
            parent=self.id,
            source=self.source,
            tokens=self.tokens,
        )

    def using(self, products: Products | None) -> "GroupCalibration":
        """The same calibration, by id too, with its matrix products run elsewhere."""
        bundles = {name: replace(b, products=products) for name, b in self.bundles.items()}
        return replace(self, bundles=bundles)

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
        found = cls(
            bundles={b.name: b for b in (_bundle(f, tensors) for f in fields.objects("bundles"))},
            **read_about(fields),
        )
        check_read(found, opened, tensors)
        return found


def read_about(fields: fmt.Fields) -> dict[str, Any]:
    """The fields that all kinds of calibrations of a layer group have.

    Raises: CalibrationCorruptError.
    """
    specs = [RopeSpec.from_json(value) for value in fields.items("rope_specs")]
    return {
        "model_id": fields.digest("model_id"),
        "layers": fields.range("layers"),
        "heads": fields.range("heads"),
        "ropes": _ropes(fields, specs),
        "parent": fields.digest("parent", optional=True),
        "source": fields.text("source"),
        "tokens": fields.integer("tokens"),
    }


def check_read(found: GroupCalibration, opened: fmt.Opened, left: fmt.Tensors) -> None:
    """Whether a calibration is what its blob says, and all of it.

    Args:
        left: tensors that it took nothing of.
    Raises: CalibrationCorruptError.
    """
    where = opened.fields.where
    fmt.check_header(opened, found.model_id, found.layers, found.heads)
    if left:
        raise CalibrationCorruptError(where, f"unknown tensors {sorted(left)[:3]}")
    if found.id != opened.header.page_key:
        raise CalibrationCorruptError(where, "is not written in canonical form")


def within(what: str, part: tuple[int, int], whole: tuple[int, int]) -> slice:
    """``part`` as indices within ``whole``. Raises: ConfigError: it reaches beyond."""
    if not whole[0] <= part[0] < part[1] <= whole[1]:
        raise ConfigError(what, f"{part[0]}-{part[1]}", f"within {whole[0]}-{whole[1]}")
    return slice(part[0] - whole[0], part[1] - whole[0])


def _bundle(fields: fmt.Fields, tensors: dict[str, npt.NDArray[np.floating]]) -> BundleCalibration:
    described = fields.objects("streams")
    name = JOINER.join(part.text("name") for part in described)

    def take(field: str) -> Any:  # shapes and dtypes are checked in the class
        value = tensors.pop(f"{name}/{field}", None)
        if value is None:
            raise CalibrationCorruptError(fields.where, f"tensor '{name}/{field}' is missing")
        return value

    parts = tuple(
        StreamPart(
            name=part.text("name"),
            heads=part.integer("heads", 1, MAX_HEADS),
            dim=part.integer("dim", 1, MAX_WIDTH),
            weight=take(f"weight/{part.text('name')}") if part.flag("weighted") else None,
        )
        for part in described
    )
    return BundleCalibration(
        parts=parts,
        mean=take("mean"),
        basis=take("basis"),
        sigma=take("sigma"),
        importance=take("importance") if fields.flag("importance") else None,
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
