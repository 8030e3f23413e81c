"""GGUF files: metadata and where each tensor lies. Reads no weights, imports no mlx.

Source: the GGUF specification, version 3 (ggml-org/ggml, docs/gguf.md).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from kvferry.errors import ModelError

MAX_STRING = 1 << 24
MAX_ITEMS = 1 << 24
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# ggml type -> (name, values in a block, bytes of a block)
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Where a tensor's bytes lie: name, dtype, shape, and a range of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says before its weights."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorRange, ...]


def read_gguf(path: Path) -> GgufFile:
    """Read metadata and tensor table. Raises: ModelError for anything that is not GGUF."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            return _read(file, size)
        except (struct.error, ValueError, KeyError, MemoryError) as exc:
            raise ModelError(f"{path.name} is no readable GGUF file: {exc}") from exc


def _read(file: BinaryIO, size: int) -> GgufFile:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, pairs = _number(file, "<I"), _number(file, "<Q"), _number(file, "<Q")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not known here")
    metadata: dict[str, Any] = {}
    for _ in range(_capped(pairs, MAX_ITEMS)):
        key = _string(file)
        metadata[key] = _value(file, int(_number(file, "<I")))
    table = [_tensor(file) for _ in range(_capped(tensors, MAX_ITEMS))]
    alignment = int(metadata.get("general.alignment", 32))
    if alignment < 1:
        raise ValueError(f"alignment {alignment}")
    base = -(-file.tell() // alignment) * alignment
    placed = [TensorRange(t.name, t.dtype, t.shape, base + t.start, base + t.end) for t in table]
    if any(t.end > size for t in placed):
        raise ValueError("it is cut short")
    return GgufFile(metadata, tuple(placed))


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _capped(count: int, cap: int) -> int:
    if count > cap:
        raise ValueError(f"{count:,} items where at most {cap:,} make sense")
    return count


def _string(file: BinaryIO) -> str:
    length = _capped(_number(file, "<Q"), MAX_STRING)
    data = file.read(length)
    if len(data) != length:
        raise ValueError("it is cut short")
    return data.decode("utf-8", errors="surrogateescape")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, count = int(_number(file, "<I")), _capped(_number(file, "<Q"), MAX_ITEMS)
        if inner == _ARRAY:
            raise ValueError("arrays of arrays are not known here")
        return [_value(file, inner) for _ in range(count)]
    return _number(file, _SCALARS[kind])


def _tensor(file: BinaryIO) -> TensorRange:
    name = _string(file)
    shape = [_number(file, "<Q") for _ in range(_capped(_number(file, "<I"), 8))]
    kind, offset = _number(file, "<I"), _number(file, "<Q")
    if kind not in _TYPES:
        raise ValueError(f"tensor {name} has type {kind}, which is not known here")
    dtype, values, block = _TYPES[kind]
    count = prod(shape)
    if count % values:
        raise ValueError(f"tensor {name} has {count} values in blocks of {values}")
    # GGUF lists dimensions from the fastest on.
    return TensorRange(
        name, dtype, tuple(reversed(shape)), offset, offset + count // values * block
    )
