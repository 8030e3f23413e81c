"""6- or 8-bit min/max quantization, bit-packed into pages of 16 to 64 KB."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from kvferry.codec import options as opts
from kvferry.codec import sections as sec
from kvferry.codec.base import (
    STATE_PREFIX,
    CalibrationSource,
    DType,
    Encoded,
    FloatArray,
    PageTensors,
    Stream,
    Wanted,
    store_float32,
)
from kvferry.codec.bitpack_pages import PageLayout, check_values, pack_pages, unpack_pages
from kvferry.codec.calibrated import read_sink_count
from kvferry.codec.sinks import check_sinks, pack_sinks, read_sinks, sink_count
from kvferry.codec.uncalibrated import Uncalibrated
from kvferry.errors import CorruptBlobError
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

BITS = (6, 8)
PAGE_SIZES_KB = tuple(range(16, 65))
_PARAMS = ("bits", "page_size_kb", "sinks")


@dataclass(frozen=True, slots=True)
class BitpackCodec(Uncalibrated):
    """Each channel of a head has its own range over the tokens of a page.

    Sections ``<stream>/<n>``: pages as `kvferry.codec.bitpack_pages` has them, layer by
    layer and head by head, so that a reader of some layers decodes their pages only;
    ``<stream>/sinks``: the first tokens of a sequence, exact.
    """

    name: ClassVar[str] = "bitpack"
    version: ClassVar[int] = 1

    bits: int = 6
    page_size_kb: int = 32

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """``bits``: 6 or 8; ``page_size_kb``: 16 to 64. Raises: ConfigError."""
        opts.check_names(cls.name, options, ("bits", "page_size_kb"))
        return cls(
            opts.whole_number("bits", options.get("bits", 6), BITS),
            opts.whole_number("page_size_kb", options.get("page_size_kb", 32), PAGE_SIZES_KB),
        )

    @property
    def params(self) -> Mapping[str, object]:
        """``bits``, ``page_size_kb``, ``sinks`` (exact tokens)."""
        return {"bits": self.bits, "page_size_kb": self.page_size_kb, "sinks": SINK_TOKENS}

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for NaN, infinities, and values beyond 1e38 that
        are not among a sequence's first tokens."""
        sections = []
        for name, stream in sorted(page.streams.items()):
            exact = _exact(name, page.tokens, SINK_TOKENS)
            if exact:
                sections.append(pack_sinks(f"{name}/sinks", stream, exact))
            values = stream.float32()[:, :, exact:]
            if not values.size:
                continue
            check_values(values, name)
            layout = _layout(stream.data.shape, exact, self.bits, self.page_size_kb)
            rows = values.reshape(layout.rows, layout.tokens, layout.dim)
            for index, data in enumerate(pack_pages(rows, layout)):
                sections.append(SectionData(f"{name}/{index}", data, len(data)))
        return Encoded(sections)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Raises: CorruptBlobError."""
        sec.check_params(wanted, _PARAMS)
        bits = sec.integer(wanted, "bits", BITS[0], BITS[-1])
        size = sec.integer(wanted, "page_size_kb", PAGE_SIZES_KB[0], PAGE_SIZES_KB[-1])
        if bits not in BITS:
            raise CorruptBlobError("codec parameters", f"{bits} bits")
        sinks = read_sink_count(wanted)
        parts = {name: _Part.of(wanted, name, sinks, bits, size) for name in wanted.shapes}
        sec.check_names(sections, (s for part in parts.values() for s in part.sections))
        streams = {name: part.read(wanted, sections) for name, part in parts.items()}
        return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams)


@dataclass(frozen=True, slots=True)
class _Part:
    """What a blob holds of one stream; ``layout`` None: nothing behind its exact tokens."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: DType
    exact: int
    layout: PageLayout | None

    @classmethod
    def of(cls, wanted: Wanted, name: str, sinks: int, bits: int, size: int) -> Self:
        shape = wanted.shapes[name]
        exact = _exact(name, wanted.tokens, sinks)
        layout = _layout(shape, exact, bits, size) if exact < shape[2] else None
        return cls(name, shape, wanted.dtypes[name], exact, layout)

    @property
    def sections(self) -> list[str]:
        """Names of all of them."""
        parts = [] if self.layout is None else [str(page) for page in range(self.layout.pages)]
        return [f"{self.name}/{part}" for part in ["sinks"] * bool(self.exact) + parts]

    def read(self, wanted: Wanted, sections: Mapping[str, SectionData]) -> Stream:
        layers = sec.layer_slice(wanted)
        out = np.empty((layers.stop - layers.start, *self.shape[1:]), dtype=self.dtype.storage)
        if self.exact:
            whole = (*self.shape[:2], self.exact, self.shape[3])
            section = sections[f"{self.name}/sinks"]
            check_sinks(section, int(np.prod(whole, dtype=np.int64)), self.dtype)
            out[:, :, : self.exact] = read_sinks(section, whole, self.dtype)[layers]
        if self.layout is not None:
            coded = self._coded(self.layout, layers, sections)
            store_float32(out[:, :, self.exact :], coded, self.dtype)
        return Stream(self.name, out, self.dtype)

    def _coded(
        self, layout: PageLayout, layers: slice, sections: Mapping[str, SectionData]
    ) -> FloatArray:
        """(layers, heads, tokens behind the exact ones, dim)."""
        rows = (layers.start * self.shape[1], layers.stop * self.shape[1])
        held = [sections[f"{self.name}/{page}"] for page in range(*layout.pages_of(rows))]
        for section in held:
            sec.check_raw(section, len(section.data))
        values = unpack_pages([s.data for s in held], layout, rows, f"stream {self.name!r}")
        return values.reshape(-1, self.shape[1], layout.tokens, layout.dim)


def _exact(name: str, tokens: tuple[int, int], sinks: int) -> int:
    """Leading tokens that are stored as they are; a state has no tokens."""
    return 0 if name.startswith(STATE_PREFIX) else sink_count(tokens, sinks)


def _layout(shape: Sequence[int], exact: int, bits: int, size: int) -> PageLayout:
    return PageLayout(shape[0] * shape[1], shape[2] - exact, shape[3], bits, size * 1024)
