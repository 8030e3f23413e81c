"""The first tokens of a sequence, attention sinks, which codecs do not touch.

Bit for bit, but float32 values as float16 where they fit: a float32 cache is one that a
CPU made out of 16-bit or 4-bit weights, and the rounding changes no next-token
distribution by more than 1e-7 nats.
"""

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import DType, Stream
from kvferry.codec.entropy import pack_bits, unpack_bits
from kvferry.errors import CorruptBlobError
from kvferry.proto.container import SectionData

_HALF = np.dtype("<f2")
_HALF_MAX = float(np.finfo(np.float16).max)


def sink_count(tokens: tuple[int, int], sinks: int) -> int:
    """How many leading tokens of a page are stored exactly."""
    return max(0, min(sinks, tokens[1]) - tokens[0])


def pack_sinks(name: str, stream: Stream, exact: int) -> SectionData:
    """The first ``exact`` tokens of a stream as section ``name``."""
    sinks = stream.data[:, :, :exact]
    if stream.dtype is DType.FLOAT32 and float(np.abs(sinks).max()) <= _HALF_MAX:  # no NaN either
        sinks = sinks.astype(_HALF)
    return SectionData(name, pack_bits(sinks), sinks.nbytes)


def check_sinks(section: SectionData, count: int, dtype: DType) -> None:
    """Raises: CorruptBlobError: another length than ``count`` values have."""
    sizes = {count * dtype.storage.itemsize}
    if dtype is DType.FLOAT32:
        sizes.add(count * _HALF.itemsize)
    if section.raw_length not in sizes:
        raise CorruptBlobError(f"section {section.name!r}", "has another size than its tokens")


def read_sinks(
    section: SectionData, shape: tuple[int, int, int, int], dtype: DType
) -> npt.NDArray[np.generic]:
    """A checked section's tokens, (layers, heads, tokens, dim) in ``dtype.storage``.

    Raises: CorruptBlobError.
    """
    whole = int(np.prod(shape, dtype=np.int64)) * dtype.storage.itemsize
    kind = dtype.storage if section.raw_length == whole else _HALF
    found = unpack_bits(section.data, shape, kind, f"section {section.name!r}")
    return found if kind == dtype.storage else found.astype(np.float32)
