"""What entries of streams stand for, as sections of a blob.

``kept/tokens``, a bitmap of the range, where all layers and heads keep the same tokens;
``kept/positions`` (offsets from the range's first token, u32) and ``kept/weights``
(float32) where each head has its own, byte-shuffled zstandard.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import Wanted
from kvferry.codec.entropy import pack_bits, unpack_bits
from kvferry.codec.kept import Kept, Positions, Range
from kvferry.codec.sections import layer_slice
from kvferry.errors import CorruptBlobError
from kvferry.proto.container import SectionData

TOKENS, POSITIONS, WEIGHTS = "kept/tokens", "kept/positions", "kept/weights"
_OFFSET = np.dtype("<u4")
_WEIGHT = np.dtype("<f4")


def pack_kept(kept: Kept, tokens: Range) -> list[SectionData]:
    """Sections of a `Kept` that was checked; what `read_kept` reads."""
    offsets = kept.positions - tokens[0]
    if offsets.ndim == 1:
        present = np.zeros(tokens[1] - tokens[0], dtype=np.bool_)
        present[offsets] = True
        bitmap = np.packbits(present, bitorder="little").tobytes()
        return [SectionData(TOKENS, bitmap, len(bitmap))]
    packed = np.ascontiguousarray(offsets, dtype=_OFFSET)
    found = [SectionData(POSITIONS, pack_bits(packed), packed.nbytes)]
    if kept.weights is not None:
        weights = np.ascontiguousarray(kept.weights, dtype=_WEIGHT)
        found.append(SectionData(WEIGHTS, pack_bits(weights), weights.nbytes))
    return found


def kept_names(sections: Mapping[str, SectionData]) -> set[str]:
    """Those names that `read_kept` will read: one form or the other."""
    return {TOKENS} if TOKENS in sections else {POSITIONS} | ({WEIGHTS} & set(sections))


def read_kept(
    wanted: Wanted, sections: Mapping[str, SectionData], *, contiguous: bool = False
) -> Kept:
    """What the entries of ``wanted.cut`` stand for; their number is that of the shapes.

    Raises: CorruptBlobError.
    """
    counts = {shape[2] for shape in wanted.shapes.values()}
    if len(counts) != 1:
        raise CorruptBlobError("streams", f"have {sorted(counts)} entries")
    count = counts.pop()
    if TOKENS in sections:
        name = TOKENS
        kept = Kept(read_tokens(sections[name], count, wanted.tokens), contiguous=contiguous)
    else:
        name, weights = POSITIONS, None
        heads = max(shape[1] for shape in wanted.shapes.values())
        shape = (wanted.layers[1] - wanted.layers[0], heads, count)
        offsets = _read(sections, POSITIONS, shape, _OFFSET)
        if WEIGHTS in sections:
            weights = _read(sections, WEIGHTS, shape, _WEIGHT).astype(np.float32, copy=False)
        kept = Kept(offsets.astype(np.int64) + wanted.tokens[0], weights, contiguous)
    if problem := kept.problem(wanted.layers, wanted.heads, wanted.tokens):
        raise CorruptBlobError(f"section {name!r}", problem)
    return kept.cut(0, layer_slice(wanted))


def read_tokens(section: SectionData, count: int, tokens: Range) -> Positions:
    """Absolute positions in a bitmap, (count,), rising. Raises: CorruptBlobError."""
    whole = tokens[1] - tokens[0]
    size = -(-whole // 8)
    if len(section.data) != size or section.raw_length != size:
        raise CorruptBlobError(f"section {section.name!r}", f"is no bitmap of {whole:,} tokens")
    bits = np.unpackbits(np.frombuffer(section.data, dtype=np.uint8), bitorder="little")
    found = np.flatnonzero(bits).astype(np.int64)
    if len(found) != count or (count and found[-1] >= whole):
        raise CorruptBlobError(
            f"section {section.name!r}", f"marks {len(found):,} tokens of {whole:,}, not {count:,}"
        )
    return found + tokens[0]


def _read(
    sections: Mapping[str, SectionData],
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> npt.NDArray[np.generic]:
    field = f"section {name!r}"
    if name not in sections:
        raise CorruptBlobError(field, "is missing")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if sections[name].raw_length != size:
        raise CorruptBlobError(field, f"decodes to another size than {size:,} bytes")
    return unpack_bits(sections[name].data, shape, dtype, field)
