"""Exact codecs: the bits as they are (`raw`), and byte-shuffled zstandard (`zstd`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from kvferry.codec import options as opts
from kvferry.codec import sections as sec
from kvferry.codec.base import (
    CalibrationSource,
    Encoded,
    PageTensors,
    Stream,
    Wanted,
)
from kvferry.codec.entropy import DEFAULT_ZSTD_LEVEL, pack_bits, unpack_bits
from kvferry.codec.uncalibrated import Uncalibrated
from kvferry.errors import CorruptBlobError
from kvferry.proto.container import SectionData


@dataclass(frozen=True, slots=True)
class RawCodec(Uncalibrated):
    """Every bit as it is, NaN included; sections ``<stream>/raw``."""

    name: ClassVar[str] = "raw"
    version: ClassVar[int] = 1

    @property
    def params(self) -> Mapping[str, object]:
        """None."""
        return {}

    def encode(self, page: PageTensors) -> Encoded:
        """Copy the bits."""
        sections = []
        for name, stream in sorted(page.streams.items()):
            data = stream.data.tobytes()
            sections.append(SectionData(f"{name}/raw", data, len(data)))
        return Encoded(sections)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Views of the blob's own bytes: read-only arrays. Raises: CorruptBlobError."""
        sec.check_params(wanted, ())
        sec.check_names(sections, (f"{name}/raw" for name in wanted.shapes))
        streams = {}
        for name, shape in wanted.shapes.items():
            section, dtype = sections[f"{name}/raw"], wanted.dtypes[name]
            size = int(np.prod(shape, dtype=np.int64)) * dtype.storage.itemsize
            sec.check_raw(section, size)
            if len(section.data) != size:
                raise CorruptBlobError(f"section {section.name!r}", "is not as long as its tensor")
            data = np.frombuffer(section.data, dtype=dtype.storage).reshape(shape)
            streams[name] = Stream(name, data[sec.layer_slice(wanted)], dtype)
        return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams)


@dataclass(frozen=True, slots=True)
class ZstdCodec(Uncalibrated):
    """Every bit as it is, bytes of equal significance together, zstandard.

    Sections ``<stream>/zstd``.
    """

    name: ClassVar[str] = "zstd"
    version: ClassVar[int] = 1

    level: int = DEFAULT_ZSTD_LEVEL

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """``level``: 1 to 22. Raises: ConfigError."""
        opts.check_names(cls.name, options, ("level",))
        level = options.get("level", DEFAULT_ZSTD_LEVEL)
        return cls(opts.whole_number("level", level, tuple(range(1, 23))))

    @property
    def params(self) -> Mapping[str, object]:
        """``level``: equal keys mean equal bytes."""
        return {"level": self.level}

    def encode(self, page: PageTensors) -> Encoded:
        """Shuffle and compress, one thread."""
        return Encoded(
            [
                SectionData(f"{name}/zstd", pack_bits(s.data, self.level), s.data.nbytes)
                for name, s in sorted(page.streams.items())
            ]
        )

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Raises: CorruptBlobError."""
        sec.check_params(wanted, ("level",))
        sec.check_names(sections, (f"{name}/zstd" for name in wanted.shapes))
        streams = {}
        for name, shape in wanted.shapes.items():
            section, dtype = sections[f"{name}/zstd"], wanted.dtypes[name]
            sec.check_raw(section, int(np.prod(shape, dtype=np.int64)) * dtype.storage.itemsize)
            data = unpack_bits(section.data, shape, dtype.storage, f"section {section.name!r}")
            streams[name] = Stream(name, data[sec.layer_slice(wanted)], dtype)
        return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams)
