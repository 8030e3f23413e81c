"""What every codec has in common: page tensors in, sections out, and back."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvferry.errors import CalibrationMissingError, UnsupportedTensorError
from kvferry.proto.container import SectionData

FloatArray = npt.NDArray[np.float32]


class DType(enum.StrEnum):
    """Element types of a cache. numpy has no bfloat16: its bits travel as uint16."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def storage(self) -> np.dtype[np.generic]:
        """numpy dtype that carries the bits, little-endian."""
        return np.dtype({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[self.value])


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One kind of tensor of a page.

    Attributes:
        name: "k", "v", "latent", "rope_key", "index_key" or "state.*".
        data: (layers, heads, tokens, dim), in ``dtype.storage``; keys as the cache has
            them, that is with RoPE applied.
        dtype: what the elements mean.
    """

    name: str
    data: npt.NDArray[np.generic]
    dtype: DType

    def __post_init__(self) -> None:
        if self.data.ndim != 4:
            raise UnsupportedTensorError(self.name, f"shape {self.data.shape} is not 4-d")
        if self.data.dtype != self.dtype.storage:
            raise UnsupportedTensorError(
                self.name, f"array of {self.data.dtype} cannot carry {self.dtype.value}"
            )

    def float32(self) -> FloatArray:
        """The values as float32, (layers, heads, tokens, dim). Exact for all dtypes."""
        if self.dtype is DType.BFLOAT16:
            bits = self.data.astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32)
        return self.data.astype(np.float32)

    @classmethod
    def from_float32(cls, name: str, values: FloatArray, dtype: DType) -> "Stream":
        """Round float32 values to ``dtype`` (to nearest even)."""
        if dtype is DType.BFLOAT16:
            bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            return cls(name, (rounded >> np.uint32(16)).astype("<u2"), dtype)
        return cls(name, values.astype(dtype.storage), dtype)


@dataclass(frozen=True, slots=True, eq=False)
class PageTensors:
    """The streams of consecutive tokens of a range of layers and KV heads.

    Attributes:
        layers, heads, tokens: absolute, half-open.
        streams: name -> stream; each (layers, heads, tokens, dim) with these counts
            (a stream that heads do not divide, as MLA's, has one head).
    """

    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, int]
    streams: Mapping[str, Stream]

    def __post_init__(self) -> None:
        layers = self.layers[1] - self.layers[0]
        tokens = self.tokens[1] - self.tokens[0]
        for name, stream in self.streams.items():
            if name != stream.name or stream.data.shape[0] != layers:
                raise UnsupportedTensorError(name, f"{stream.data.shape[0]} layers of {layers}")
            if stream.data.shape[2] != tokens:
                raise UnsupportedTensorError(name, f"{stream.data.shape[2]} tokens of {tokens}")

    def cut_layers(self, layers: tuple[int, int]) -> "PageTensors":
        """The part that lies in ``layers`` (absolute, within this page's)."""
        a, b = layers[0] - self.layers[0], layers[1] - self.layers[0]
        streams = {n: Stream(n, s.data[a:b], s.dtype) for n, s in self.streams.items()}
        return PageTensors(layers, self.heads, self.tokens, streams)

    @property
    def raw_bytes_fp16(self) -> int:
        """Bytes that these tensors take at two bytes a value."""
        return sum(2 * s.data.size for s in self.streams.values())


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What a codec made of a page. What differs from page to page is in the sections."""

    sections: Sequence[SectionData]
    rope_fingerprint: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What a reader asks of a blob: shapes and dtypes from its header, and which layers.

    Attributes:
        layers, heads, tokens: the blob's own ranges.
        shapes: stream name -> (layers, heads, tokens, dim), already checked against caps.
        dtypes: stream name -> dtype.
        cut: the layers to return, within ``layers``.
        params: the parameters that the blob was written with.
    """

    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, int]
    shapes: Mapping[str, tuple[int, int, int, int]]
    dtypes: Mapping[str, DType]
    cut: tuple[int, int]
    params: Mapping[str, object]
    calibration_id: bytes = b""
    rope_fingerprint: bytes = b""


@runtime_checkable
class CalibrationLike(Protocol):
    """What codecs with a calibration carry; see `kvferry.codec.calibration`."""

    @property
    def id(self) -> bytes:
        """32 bytes: the digest of its content."""


class CalibrationSource(Protocol):
    """Where a decoder finds the calibration that a blob names."""

    def get(self, calibration_id: bytes) -> CalibrationLike:
        """Raises: CalibrationMissingError."""


class NoCalibrations:
    """A source without any."""

    def get(self, calibration_id: bytes) -> CalibrationLike:
        raise CalibrationMissingError(calibration_id.hex())


@runtime_checkable
class Codec(Protocol):
    """Tensors to bytes and back. Pure and synchronous; same input, same bytes.

    Implementations are frozen dataclasses whose fields are their options.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    @property
    def params(self) -> Mapping[str, object]:
        """The options that a blob's header and key carry, known before encoding."""

    @property
    def calibration_id(self) -> bytes:
        """32 bytes, part of the key; empty for codecs without a calibration."""

    def fit(self, sample: Iterable[PageTensors]) -> CalibrationLike | None:
        """Learn from pages of one model; None for codecs that have nothing to learn."""

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for input that cannot be stored faithfully."""

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Restore ``wanted.cut`` layers of the blob.

        Raises: CorruptBlobError, CalibrationMissingError, IdentityMismatchError.
        """
