"""Which streams and layers the bytes of a blob go to, as far as its header says."""

import math
import re
from dataclasses import dataclass

from kvferry.codec.calibration_bundle import JOINER
from kvferry.codec.registry import restorable
from kvferry.proto.v1 import blob_pb2

SHAPE_DIMS = 4
# Sections of one layer may say so: "k/L3/q".
_LAYER_PART = re.compile(r"(?:.*/)?L([0-9]{1,6})(?:/.*)?")


@dataclass(frozen=True, slots=True)
class StreamSize:
    """One stream: values (of all tokens, kept or not), and the bytes that its sections take."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: int
    size: int

    @property
    def fp16_bytes(self) -> int:
        """What the values take at two bytes each."""
        return 2 * self.values


@dataclass(frozen=True, slots=True)
class LayerSize:
    """Bytes of one layer; a fair share where its layers are coded together."""

    layer: int
    size: float
    exact: bool


def stream_sizes(header: blob_pb2.BlobHeader) -> list[StreamSize]:
    """Bytes by stream; those of streams that are coded together go by their values."""
    shapes = {stream.name: tuple(stream.shape) for stream in header.streams}
    values = {name: _values(shape, header) for name, shape in shapes.items()}
    sizes = dict.fromkeys(shapes, 0.0)
    for section in header.sections:
        owners = [n for n in section.name.partition("/")[0].split(JOINER) if n in sizes]
        total = sum(values[name] for name in owners)
        for name in owners:
            sizes[name] += section.length * (values[name] / total if total else 1 / len(owners))
    return [
        StreamSize(s.name, shapes[s.name], s.dtype, values[s.name], round(sizes[s.name]))
        for s in header.streams
    ]


def _values(shape: tuple[int, ...], header: blob_pb2.BlobHeader) -> int:
    if len(shape) != SHAPE_DIMS:
        return 0
    if not restorable(header.codec.name):
        shape = (*shape[:2], header.token_end - header.token_start, shape[3])
    return math.prod(shape)


def layer_sizes(header: blob_pb2.BlobHeader) -> list[LayerSize]:
    """Bytes by layer: exact where a section is one layer's, or is stored as it is."""
    count = header.layer_end - header.layer_start
    own = dict.fromkeys(range(header.layer_start, header.layer_end), 0)
    shared, exact = 0.0, True
    for section in header.sections:
        part = _LAYER_PART.fullmatch(section.name)
        if part and int(part[1]) in own:
            own[int(part[1])] += section.length
            continue
        shared += section.length / count
        exact &= section.length == section.raw_length and section.length % count == 0
    return [LayerSize(layer, size + shared, exact) for layer, size in own.items()]
