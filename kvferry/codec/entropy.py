"""Entropy coding with caps: pcodec for coefficients, byte-shuffled zstandard for bits.

Whoever decodes knows the length of the result beforehand, and bytes that would give
another length are refused. Both decoders write into memory of just that length.
"""

import numpy as np
import numpy.typing as npt
import zstandard
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec import wrapped as pco

from kvferry.codec.base import FloatArray
from kvferry.codec.quantize import IntArray
from kvferry.errors import ConfigError, CorruptBlobError, UnsupportedTensorError

BLOCK_COLUMNS = 64
# pcodec's own limit for a chunk is 2**24 numbers.
MAX_TOKENS = (1 << 24) // BLOCK_COLUMNS
DEFAULT_ZSTD_LEVEL = 3
_PCO_LEVEL = 8
_MAX_WINDOW_BYTES = 1 << 27
_NAMES = {2: "i16", 4: "i32"}


def pack_columns(q: IntArray) -> bytes:
    """Code integers, 64 columns at a time, each block with statistics of its own.

    Args:
        q: (tokens, columns) int16 or int32; columns ordered by variance, so that those
            of a block are alike.
    Returns: pcodec's header (2 bytes), one u32le length per block, the blocks.
    Raises: UnsupportedTensorError: more than `MAX_TOKENS` tokens.
    """
    tokens, columns = q.shape
    if not 1 <= tokens <= MAX_TOKENS:
        raise UnsupportedTensorError("*", f"{tokens} tokens in a page, at most {MAX_TOKENS}")
    blocks: list[bytes] = []
    files = pco.FileCompressor()
    for start in range(0, columns, BLOCK_COLUMNS):
        block = np.ascontiguousarray(q[:, start : start + BLOCK_COLUMNS]).reshape(-1)
        config = ChunkConfig(
            compression_level=_PCO_LEVEL,
            mode_spec=ModeSpec.classic(),
            delta_spec=DeltaSpec.no_op(),
            paging_spec=PagingSpec.exact_page_sizes([block.size]),
        )
        chunk = files.chunk_compressor(block, config)
        blocks.append(chunk.write_meta() + chunk.write_page(0))
    lengths = np.array([len(block) for block in blocks], dtype="<u4").tobytes()
    return b"".join([files.write_header(), lengths, *blocks])


def unpack_columns(
    data: bytes | memoryview, itemsize: int, scale: float, out: FloatArray, field: str
) -> None:
    """Decode what `pack_columns` wrote and write it, times ``scale``, into ``out``.

    Args:
        itemsize: 2 or 4, bytes of an integer.
        out: (tokens, columns) float32; any view.
        field: what to name in errors.
    Raises: CorruptBlobError. Nothing is allocated beyond one block.
    """
    tokens, columns = out.shape
    count = -(-columns // BLOCK_COLUMNS)
    raw = bytes(data)
    if itemsize not in _NAMES or not 1 <= tokens <= MAX_TOKENS:
        raise CorruptBlobError(field, f"{itemsize}-byte integers of {tokens} tokens")
    try:
        header, at = pco.FileDecompressor.new(raw[:16])
    except (RuntimeError, TypeError) as exc:
        raise CorruptBlobError(field, "no pcodec header") from exc
    table = raw[at : at + 4 * count]
    at += 4 * count
    lengths = np.frombuffer(table, dtype="<u4").tolist() if len(table) == 4 * count else []
    if not lengths or at + sum(lengths) != len(raw):
        raise CorruptBlobError(field, "block lengths do not add up")
    for index, length in enumerate(lengths):
        start = index * BLOCK_COLUMNS
        width = min(BLOCK_COLUMNS, columns - start)
        block = _unpack_block(header, raw[at : at + length], itemsize, tokens * width, field)
        np.multiply(
            block.reshape(tokens, width),
            np.float32(scale),
            out=out[:, start : start + width],
            casting="same_kind",
        )
        at += length


def _unpack_block(
    header: pco.FileDecompressor, raw: bytes, itemsize: int, size: int, field: str
) -> IntArray:
    # First byte: mode and delta. Only "classic, none" is ours, and the others can ask
    # for memory of their own.
    if raw[:1] != b"\x00":
        raise CorruptBlobError(field, "a block in another mode than classic")
    block: IntArray = np.empty(size, np.int16) if itemsize == 2 else np.empty(size, np.int32)
    try:
        chunk, used = header.chunk_decompressor(raw, _NAMES[itemsize])
        progress, read = chunk.read_page_into(raw[used:], size, block)
    except (RuntimeError, TypeError, ValueError) as exc:
        raise CorruptBlobError(field, "a block does not decode") from exc
    if progress.n_processed != size or not progress.finished or used + read != len(raw):
        raise CorruptBlobError(field, "a block has another length than its page")
    return block


def check_level(level: object) -> int:
    """A zstandard level. Raises: ConfigError."""
    try:
        value = int(str(level))
    except ValueError as exc:
        raise ConfigError("level", level, "a whole number from 1 to 22") from exc
    if not 1 <= value <= 22:
        raise ConfigError("level", level, "a whole number from 1 to 22")
    return value


def pack_bits(data: npt.NDArray[np.generic], level: int = DEFAULT_ZSTD_LEVEL) -> bytes:
    """Exact: bytes of equal significance side by side, then zstandard, one thread."""
    raw = np.ascontiguousarray(data).reshape(-1)
    planes = np.ascontiguousarray(raw.view(np.uint8).reshape(-1, raw.itemsize).T)
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(planes.data)


def unpack_bits(
    data: bytes | memoryview,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    field: str,
) -> npt.NDArray[np.generic]:
    """Decode what `pack_bits` wrote into an array of the caller's shape.

    Raises: CorruptBlobError. The size that a frame claims is checked before any memory
        is taken for it.
    """
    count = int(np.prod(shape, dtype=np.int64))
    size = count * dtype.itemsize
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != size or frame.window_size > max(_MAX_WINDOW_BYTES, size):
            raise CorruptBlobError(field, f"frame of {frame.content_size:,} bytes, {size:,} wanted")
        raw = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as exc:
        raise CorruptBlobError(field, "zstandard frame does not decode") from exc
    if len(raw) != size:
        raise CorruptBlobError(field, f"frame of {len(raw):,} bytes, {size:,} wanted")
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(dtype.itemsize, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype).reshape(shape)
