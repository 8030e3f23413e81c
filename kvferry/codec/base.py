"""What every codec has in common: page tensors in, sections out, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from kvferry.codec.kept import Kept, Positions
from kvferry.codec.stream import (
    RING_KEYS,
    RING_VALUES,
    STATE_PREFIX,
    DType,
    FloatArray,
    Stream,
    clip_to,
    store_float32,
)
from kvferry.errors import CalibrationMissingError, UnsupportedTensorError
from kvferry.proto.container import SectionData

__all__ = [
    "RING_KEYS",
    "RING_VALUES",
    "STATE_PREFIX",
    "CalibrationLike",
    "CalibrationSource",
    "Codec",
    "CodedPage",
    "DType",
    "DroppingCodec",
    "Encoded",
    "FloatArray",
    "NoCalibrations",
    "PageTensors",
    "Positions",
    "RunCodec",
    "Stream",
    "Wanted",
    "clip_to",
    "drops_tokens",
    "store_float32",
    "takes_whole_context",
]


@dataclass(frozen=True, slots=True, eq=False)
class PageTensors:
    """The streams of consecutive tokens of a range of layers and KV heads.

    Attributes:
        layers, heads, tokens: absolute, half-open.
        streams: name -> stream; each (layers, heads, tokens, dim) with these counts
            (a stream that heads do not divide, as MLA's, has one head; "state.*"
            streams have layers only).
        kept: None: the streams have all tokens. Else the streams have ``kept.count``
            entries in place of the tokens, and this says what each stands for.
    """

    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, int]
    streams: Mapping[str, Stream]
    kept: Kept | None = None

    def __post_init__(self) -> None:
        layers, heads, tokens = (b - a for a, b in (self.layers, self.heads, self.tokens))
        if min(layers, heads, tokens) < 1 or min(self.layers[0], self.heads[0], self.tokens[0]) < 0:
            raise UnsupportedTensorError(
                "*", f"layers {self.layers}, heads {self.heads}, tokens {self.tokens} are no ranges"
            )
        if self.kept is not None:
            if problem := self.kept.problem(self.layers, self.heads, self.tokens):
                raise UnsupportedTensorError("kept", problem)
            tokens = self.kept.count
        for name, stream in self.streams.items():
            shape = stream.data.shape
            if name != stream.name or shape[0] != layers:
                raise UnsupportedTensorError(name, f"{shape[0]} layers of {layers}")
            if not all(shape):
                raise UnsupportedTensorError(name, f"shape {shape} has no elements")
            if name.startswith(STATE_PREFIX):
                continue
            if shape[1] not in (heads, 1):
                raise UnsupportedTensorError(name, f"{shape[1]} heads of {heads}")
            if shape[2] != tokens:
                raise UnsupportedTensorError(name, f"shape {shape} for {tokens} tokens")

    @property
    def entries(self) -> int:
        """Length of the streams' token axis."""
        return self.tokens[1] - self.tokens[0] if self.kept is None else self.kept.count

    def take(self, entries: Positions, *, contiguous: bool = False) -> "PageTensors":
        """Only some entries of every stream; copies.

        Args:
            entries: (n,) rising indices into the token axis.
            contiguous: see `Kept`.
        Raises: UnsupportedTensorError for pages whose heads keep different tokens.
        """
        if self.kept is None:
            positions = np.arange(*self.tokens, dtype=np.int64)
        else:
            positions = self.kept.positions
        if positions.ndim > 1 or any(name.startswith(STATE_PREFIX) for name in self.streams):
            raise UnsupportedTensorError("*", "entries of such a page cannot be dropped")
        streams = {n: Stream(n, s.data[:, :, entries], s.dtype) for n, s in self.streams.items()}
        kept = Kept(positions[entries], contiguous=contiguous)
        return PageTensors(self.layers, self.heads, self.tokens, streams, kept)

    def cut_layers(self, layers: tuple[int, int]) -> "PageTensors":
        """The part that lies in ``layers`` (absolute, within this page's); views."""
        return self._cut(0, layers, self.heads, self.tokens)

    def cut_heads(self, heads: tuple[int, int]) -> "PageTensors":
        """The part that lies in ``heads``; views. Streams with one head stay whole."""
        return self._cut(1, self.layers, heads, self.tokens)

    def cut_tokens(self, tokens: tuple[int, int]) -> "PageTensors":
        """The part that lies in ``tokens``; views.

        Raises: UnsupportedTensorError also for pages that lack tokens.
        """
        if self.kept is not None:
            raise UnsupportedTensorError("*", "a page that lacks tokens is not cut by tokens")
        return self._cut(2, self.layers, self.heads, tokens)

    def _cut(
        self,
        axis: int,
        layers: tuple[int, int],
        heads: tuple[int, int],
        tokens: tuple[int, int],
    ) -> "PageTensors":
        have = (self.layers, self.heads, self.tokens)[axis]
        want = (layers, heads, tokens)[axis]
        if not have[0] <= want[0] < want[1] <= have[1]:
            raise UnsupportedTensorError("*", f"{want} does not lie within {have}")
        part = slice(want[0] - have[0], want[1] - have[0])
        whole = have[1] - have[0]
        streams = {}
        for name, stream in self.streams.items():
            replicated = axis == 1 and stream.data.shape[1] != whole
            replicated |= axis > 0 and name.startswith(STATE_PREFIX)
            index = (slice(None),) * axis + (slice(None) if replicated else part,)
            streams[name] = Stream(name, stream.data[index], stream.dtype)
        kept = None if self.kept is None else self.kept.cut(axis, part)
        return PageTensors(layers, heads, tokens, streams, kept)

    @property
    def raw_bytes_fp16(self) -> int:
        """Bytes that these tensors take at two bytes a value."""
        return sum(2 * s.data.size for s in self.streams.values())


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What a codec made of a page. What differs from page to page is in the sections.

    Attributes:
        entries: length of the streams' token axis; 0: as the page has it.
    """

    sections: Sequence[SectionData]
    rope_fingerprint: bytes = b""
    entries: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What a reader asks of a blob: shapes and dtypes from its header, and which layers.

    Attributes:
        layers, heads, tokens: the blob's own ranges.
        shapes: stream name -> (layers, heads, tokens, dim), already checked against caps;
            of codecs that drop tokens (layers, heads, entries, dim), at most as many
            entries as tokens, and equally many in all streams.
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


@runtime_checkable
class DroppingCodec(Protocol):
    """A codec whose pages come back with `PageTensors.kept`: fewer entries than tokens.

    Attributes:
        whole_context: whether it is to be given a whole run of tokens as one page, since
            it chooses among all of them.
    """

    whole_context: ClassVar[bool]


def drops_tokens(codec: object) -> bool:
    """Whether a codec (or its class) may give fewer entries than tokens."""
    return isinstance(codec, DroppingCodec)


def takes_whole_context(codec: object) -> bool:
    """Whether a codec is to be given a whole run of tokens as one page."""
    return isinstance(codec, DroppingCodec) and codec.whole_context


@dataclass(frozen=True, slots=True, eq=False)
class CodedPage:
    """One blob that is ready to be decoded."""

    wanted: Wanted
    sections: Mapping[str, SectionData]


@runtime_checkable
class RunCodec(Protocol):
    """A codec that gains by decoding several pages at once."""

    def decode_run(
        self, pages: Sequence[CodedPage], calibrations: CalibrationSource
    ) -> list[PageTensors]:
        """Decode pages that agree in all but their tokens and sections.

        Returns: one page per entry, in order; they may be views of shared arrays.
        Raises: as `Codec.decode`, for the first page that fails.
        """
