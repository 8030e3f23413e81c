"""How calibrations are framed: a container with a JSON description and tensors.

section "description"  canonical JSON object
section "tensors"      safetensors; absent where there are none
id = BLAKE3("kvferry/calibration/1" | length of description u64le | description | tensors)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from blake3 import blake3

from kvferry import __version__
from kvferry.errors import (
    BlobTooLargeError,
    CalibrationCorruptError,
    CorruptBlobError,
    UnsupportedVersionError,
)
from kvferry.proto import container
from kvferry.proto.container import Limits, SectionData
from kvferry.proto.keys import DIGEST_BYTES, MAX_HEADS, MAX_LAYERS, BlobKey, canonical_json
from kvferry.proto.v1 import blob_pb2

DESCRIPTION_VERSION = 2  # 1 coded every stream of a group by itself
MAX_DESCRIPTION_BYTES = 8 << 20
GROUP_NAME = "ferry"
LOWRANK_NAME = "lowrank"
MANIFEST_NAME = "manifest"
_DOMAIN = b"kvferry/calibration/1"

Tensors = Mapping[str, npt.NDArray[np.floating]]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Framed:
    """A calibration's parts as they are stored; ``id`` is the digest of both."""

    id: bytes
    description: bytes
    tensors: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A calibration blob whose checksums, sizes and id hold. Its meaning is unchecked."""

    header: blob_pb2.BlobHeader
    fields: "Fields"
    tensors: Tensors


def frame(description: Mapping[str, object], tensors: Tensors) -> Framed:
    """Serialize and digest. Tensors are float16 or float32 and C-contiguous."""
    text = canonical_json({"version": DESCRIPTION_VERSION, **description})
    raw = safetensors.numpy.save(dict(tensors)) if tensors else b""
    return Framed(_digest(text, raw), text, raw)


def to_blob(framed: Framed, name: str, model_id: bytes, layers: Range, heads: Range) -> bytes:
    """The container. ``name`` is `GROUP_NAME`, `LOWRANK_NAME` or `MANIFEST_NAME`."""
    header = blob_pb2.BlobHeader(
        kind=blob_pb2.BLOB_KIND_CALIBRATION,
        model_id=model_id,
        page_key=framed.id,
        layer_start=layers[0],
        layer_end=layers[1],
        head_start=heads[0],
        head_end=heads[1],
        codec=blob_pb2.CodecSpec(name=name, version=DESCRIPTION_VERSION, params_json="{}"),
        producer=f"kvferry {__version__}",
    )
    sections = [SectionData("description", framed.description, len(framed.description))]
    if framed.tensors:
        sections.append(SectionData("tensors", framed.tensors, len(framed.tensors)))
    return container.pack(header, sections)


def open_blob(data: bytes | memoryview, name: str, limits: Limits) -> Opened:
    """Check the container, the id and the description's form.

    Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError.
    """
    blob = container.parse(data, limits)
    if blob.header.kind != blob_pb2.BLOB_KIND_CALIBRATION:
        raise CorruptBlobError("kind", "no calibration")
    where = blob.header.page_key.hex()[:16]
    if blob.header.codec.name != name:
        raise CalibrationCorruptError(where, f"is a {blob.header.codec.name!r}, {name!r} wanted")
    if blob.header.codec.version != DESCRIPTION_VERSION:
        found = blob.header.codec.version
        raise UnsupportedVersionError("calibration", found, DESCRIPTION_VERSION)
    if not {"description"} <= set(blob.sections) <= {"description", "tensors"}:
        raise CorruptBlobError("sections", f"{sorted(blob.sections)}")
    for section in blob.sections.values():
        if section.raw_length != len(section.data):
            raise CorruptBlobError(f"section {section.name!r}", "raw length differs")
    text = bytes(blob.sections["description"].data)
    raw = bytes(blob.sections["tensors"].data) if "tensors" in blob.sections else b""
    if len(text) > MAX_DESCRIPTION_BYTES:
        raise BlobTooLargeError("description", len(text), MAX_DESCRIPTION_BYTES)
    if _digest(text, raw) != blob.header.page_key:
        raise CalibrationCorruptError(where, "its content does not hash to its id")
    fields = Fields.parse(where, text)
    fields.version(DESCRIPTION_VERSION, "calibration")
    return Opened(blob.header, fields, _tensors(where, raw))


def check_header(opened: Opened, model_id: bytes, layers: Range, heads: Range) -> None:
    """The header must say what the description says. Raises: CalibrationCorruptError."""
    header = opened.header
    said = (
        header.model_id,
        (header.layer_start, header.layer_end),
        (header.head_start, header.head_end),
    )
    if said != (model_id, layers, heads):
        raise CalibrationCorruptError(opened.fields.where, "header and description differ")


def _digest(description: bytes, tensors: bytes) -> bytes:
    hasher = blake3(_DOMAIN + len(description).to_bytes(8, "little"))
    hasher.update(description)
    hasher.update(tensors)
    return hasher.digest()


def _tensors(where: str, raw: bytes) -> Tensors:
    if not raw:
        return {}
    try:
        tensors = safetensors.numpy.load(raw)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as exc:
        raise CalibrationCorruptError(where, f"tensors do not load ({exc})") from exc
    for name, value in tensors.items():
        if value.dtype not in (np.float16, np.float32):
            raise CalibrationCorruptError(where, f"tensor {name!r} is {value.dtype}")
        if not np.isfinite(value).all():
            raise CalibrationCorruptError(where, f"tensor {name!r} holds NaN or infinite values")
    return tensors


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object read with types checked; every miss names the field.

    All readers raise CalibrationCorruptError.
    """

    where: str
    values: Mapping[str, object]

    @classmethod
    def parse(cls, where: str, text: bytes) -> "Fields":
        """Read a JSON object."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise CalibrationCorruptError(where, "its description is no JSON") from exc
        return cls.of(where, value)

    @classmethod
    def of(cls, where: str, value: object) -> "Fields":
        """Wrap a value that must be an object."""
        if not isinstance(value, dict):
            raise CalibrationCorruptError(where, "an object is wanted in its description")
        return cls(where, value)

    def fail(self, name: str) -> CalibrationCorruptError:
        """The error for a field."""
        return CalibrationCorruptError(self.where, f"field {name!r} is missing or wrong")

    def integer(self, name: str, low: int = 0, high: int = 1 << 53) -> int:
        """A whole number within bounds."""
        value = self.values.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(name)
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        if type(value) not in (int, float):
            raise self.fail(name)
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError as exc:
            raise self.fail(name) from exc
        if not np.isfinite(number):
            raise self.fail(name)
        return number

    def numbers(self, name: str, most: int) -> tuple[float, ...]:
        """An array of at most so many finite numbers."""
        values = self.items(name)
        if len(values) > most:
            raise self.fail(name)
        single = [Fields(self.where, {name: value}) for value in values]
        return tuple(field.number(name) for field in single)

    def version(self, known: int, what: str) -> None:
        """Raises: UnsupportedVersionError for another ``version`` than ``known``."""
        found = self.integer("version")
        if found != known:
            raise UnsupportedVersionError(what, found, known)

    def text(self, name: str) -> str:
        """A string."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.isprintable():
            raise self.fail(name)
        return value

    def flag(self, name: str) -> bool:
        """true or false."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self.fail(name)
        return value

    def items(self, name: str) -> list[object]:
        """An array."""
        value = self.values.get(name)
        if not isinstance(value, list):
            raise self.fail(name)
        return value

    def objects(self, name: str) -> "list[Fields]":
        """An array of objects."""
        return [Fields.of(self.where, value) for value in self.items(name)]

    def digest(self, name: str, *, optional: bool = False) -> bytes:
        """32 bytes in hex; empty where ``optional``."""
        value = self.text(name)
        if optional and not value:
            return b""
        try:
            digest = bytes.fromhex(value)
        except ValueError as exc:
            raise self.fail(name) from exc
        if len(digest) != DIGEST_BYTES or digest.hex() != value:
            raise self.fail(name)
        return digest

    def range(self, name: str) -> Range:
        """A half-open range [a, b], not empty."""
        value = self.items(name)
        if len(value) != 2 or any(type(v) is not int for v in value):
            raise self.fail(name)
        a, b = int(str(value[0])), int(str(value[1]))
        if not 0 <= a < b <= max(MAX_LAYERS, MAX_HEADS):
            raise self.fail(name)
        return a, b


def key_for(calibration_id: bytes) -> BlobKey:
    """The key under which a calibration is stored."""
    return BlobKey("calibration", calibration_id)
