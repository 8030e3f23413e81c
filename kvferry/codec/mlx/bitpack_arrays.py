"""``bitpack`` without blobs, for arrays of MLX."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kvferry.codec import bitpack_direct as direct
from kvferry.codec.base import DType, Stream
from kvferry.codec.bitpack_direct import PackedTensor
from kvferry.errors import UnsupportedTensorError

_DTYPES = {mx.float16: DType.FLOAT16, mx.bfloat16: DType.BFLOAT16, mx.float32: DType.FLOAT32}


@dataclass(frozen=True, slots=True)
class BitPackedKVCache:
    """As `kvferry.codec.bitpack_direct.BitPackedKVCache`, and bfloat16 too."""

    num_bits: int = 6
    page_size_kb: int = 32

    def __post_init__(self) -> None:
        _ = self._host

    @property
    def _host(self) -> direct.BitPackedKVCache:
        return direct.BitPackedKVCache(self.num_bits, self.page_size_kb)

    def compress_kv(self, k: mx.array, v: mx.array) -> tuple[PackedTensor, PackedTensor]:
        """Pack keys and values, each (batch, heads, tokens, dim).

        Raises: UnsupportedTensorError, as the one for numpy.
        """
        host = self._host
        return host.pack(_stream("k", k), k.shape), host.pack(_stream("v", v), v.shape)

    def decompress_kv(
        self, k_packed: PackedTensor, v_packed: PackedTensor
    ) -> tuple[mx.array, mx.array]:
        """Arrays of the shape and dtype that were packed."""
        return _array(k_packed), _array(v_packed)


def _stream(name: str, array: mx.array) -> Stream:
    if array.dtype not in _DTYPES or array.ndim != 4:
        problem = f"{array.dtype} of shape {tuple(array.shape)}"
        raise UnsupportedTensorError(name, f"{problem} is no 4-d array of 16 or 32 bit floats")
    kind = _DTYPES[array.dtype]
    host = array.view(mx.uint16) if kind is DType.BFLOAT16 else array
    return Stream(name, np.array(host), kind)


def _array(packed: PackedTensor) -> mx.array:
    made = mx.array(packed.unpack().data.reshape(packed.shape))
    return made.view(mx.bfloat16) if packed.dtype is DType.BFLOAT16 else made
