"""Tensors of a GGUF file as float32, in numpy.

Source of the block layouts: ggml-org/ggml, src/ggml-common.h (block_q4_1, block_q8_0).
"""

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.mlx.gguf import TensorRange
from kvferry.errors import ModelError

_Bytes = npt.NDArray[np.uint8]


def float32_tensors(path: Path, tensors: Iterable[TensorRange]) -> Iterator[tuple[str, FloatArray]]:
    """(name, values of the tensor's shape), one at a time; the file is mapped, not read whole.

    Raises: ModelError: an element type that is not known here, or a tensor that does not
        lie within the file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for tensor in tensors:
            read = _READERS.get(tensor.dtype)
            if read is None:
                known = ", ".join(_READERS)
                raise ModelError(
                    f"tensor {tensor.name} of {path.name} is {tensor.dtype}; torch models are made "
                    f"of {known}"
                )
            data = np.frombuffer(mapped[tensor.start : tensor.end], dtype=np.uint8)
            yield tensor.name, read(data).reshape(tensor.shape)


def _q4_1(data: _Bytes) -> FloatArray:
    """Blocks of 32: scale and minimum in float16, then low and high nibbles."""
    blocks = data.reshape(-1, 20)
    levels = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return levels * _halves(blocks[:, :2]) + _halves(blocks[:, 2:4])


def _q8_0(data: _Bytes) -> FloatArray:
    """Blocks of 32: scale in float16, then signed bytes."""
    blocks = data.reshape(-1, 34)
    found: FloatArray = blocks[:, 2:].view(np.int8) * _halves(blocks[:, :2])
    return found


def _halves(data: _Bytes) -> FloatArray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


_READERS: Mapping[str, Callable[[_Bytes], FloatArray]] = {
    "F32": lambda data: data.view("<f4").astype(np.float32),
    "F16": lambda data: data.view("<f2").astype(np.float32),
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
