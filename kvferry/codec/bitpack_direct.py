"""``bitpack`` without blobs: keys and values packed in memory, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import DType, Stream
from kvferry.codec.bitpack import BITS, PAGE_SIZES_KB
from kvferry.codec.bitpack_pages import PageLayout, check_values, pack_pages, unpack_pages
from kvferry.errors import ConfigError, UnsupportedTensorError

_DTYPES = {np.dtype("<f2"): DType.FLOAT16, np.dtype("<f4"): DType.FLOAT32}


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """Keys or values in pages, each decodable alone.

    Attributes:
        shape: (batch, heads, tokens, dim).
        pages: levels behind their own ranges; ``layout`` says where a head's lie.
    """

    shape: tuple[int, int, int, int]
    dtype: DType
    layout: PageLayout
    pages: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(map(len, self.pages))

    def unpack(self, rows: tuple[int, int] | None = None) -> Stream:
        """All heads, or those of ``rows`` (half-open; batch and heads are counted as one).

        Only the pages that hold them are read. Returns: (1, rows, tokens, dim).
        Raises: ConfigError: rows that there are not.
        """
        rows = (0, self.layout.rows) if rows is None else rows
        if not 0 <= rows[0] < rows[1] <= self.layout.rows:
            raise ConfigError("rows", rows, f"a range within 0 to {self.layout.rows}, half-open")
        first, last = self.layout.pages_of(rows)
        values = unpack_pages(self.pages[first:last], self.layout, rows, "packed")
        return Stream.from_float32("packed", values[None], self.dtype)


@dataclass(frozen=True, slots=True)
class BitPackedKVCache:
    """Min/max quantization of whole caches of keys and values, as numpy arrays.

    No token is exempt: unlike the codec this does not know where a sequence begins.
    `kvferry.codec.mlx.bitpack_arrays` has the same for MLX's arrays.

    Attributes:
        num_bits: 6 or 8.
        page_size_kb: 16 to 64.
    """

    num_bits: int = 6
    page_size_kb: int = 32

    def __post_init__(self) -> None:
        if self.num_bits not in BITS:
            raise ConfigError("num_bits", self.num_bits, "6 or 8")
        if self.page_size_kb not in PAGE_SIZES_KB:
            raise ConfigError("page_size_kb", self.page_size_kb, "16 to 64")

    def compress_kv(
        self, k: npt.NDArray[np.floating], v: npt.NDArray[np.floating]
    ) -> tuple[PackedTensor, PackedTensor]:
        """Pack keys and values, each (batch, heads, tokens, dim), float16 or float32.

        Raises: UnsupportedTensorError: another shape or dtype, nothing in it, NaN,
            infinities and values beyond 1e38.
        """
        return self.pack(_stream("k", k), k.shape), self.pack(_stream("v", v), v.shape)

    def decompress_kv(
        self, k_packed: PackedTensor, v_packed: PackedTensor
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
        """Arrays of the shape and dtype that were packed."""
        return _array(k_packed), _array(v_packed)

    def pack(self, stream: Stream, shape: tuple[int, ...]) -> PackedTensor:
        """One tensor, (batch, heads, tokens, dim). Raises: UnsupportedTensorError."""
        if len(shape) != 4 or not stream.data.size:
            raise UnsupportedTensorError(stream.name, f"shape {tuple(shape)} holds no tokens")
        values = stream.float32().reshape(-1, *shape[2:])
        check_values(values, stream.name)
        layout = PageLayout(*values.shape, self.num_bits, self.page_size_kb * 1024)
        pages = tuple(pack_pages(values, layout))
        return PackedTensor((shape[0], shape[1], *values.shape[1:]), stream.dtype, layout, pages)


def _stream(name: str, array: npt.NDArray[np.floating]) -> Stream:
    kind = _DTYPES.get(array.dtype)
    if kind is None or array.ndim != 4:
        problem = f"{array.dtype} of shape {array.shape}"
        raise UnsupportedTensorError(name, f"{problem} is no 4-d array of float16 or float32")
    return Stream(name, array, kind)


def _array(packed: PackedTensor) -> npt.NDArray[np.floating]:
    data: npt.NDArray[Any] = packed.unpack().data
    return data.reshape(packed.shape)
