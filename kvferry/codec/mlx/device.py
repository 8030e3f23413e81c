"""The matrix products of `ferry` on MLX's device, with the matrices kept there.

Results are the host's to 1e-4 of the largest coefficient or value. A coefficient may
thus round to the neighbouring step on another device: its blob is another one of equal
worth, under the same key.
"""

from threading import Lock
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from kvferry.codec.base import FloatArray
from kvferry.codec.transform import Fold, Forward, Products


class DeviceProducts:
    """`Products` on an MLX device. Any thread may call it."""

    def __init__(self, device: mx.Device | None = None) -> None:
        self._device = device or mx.default_device()
        self._forward: WeakKeyDictionary[Forward, tuple[mx.array, mx.array]] = WeakKeyDictionary()
        self._decode: WeakKeyDictionary[Fold, mx.array] = WeakKeyDictionary()
        self._lock = Lock()
        self._turn = Lock()  # a device does one product at a time anyway

    def project(self, x: FloatArray, by: Fold, rank: int) -> FloatArray:
        """(tokens, p) -> (tokens, rank), float32."""
        forward = by.forward
        with self._lock:
            if forward not in self._forward:
                self._forward[forward] = self._put(forward.matrix), self._put(forward.offset)
            matrix, offset = self._forward[forward]
        with self._turn, mx.stream(self._device):
            return self._host(mx.array(x) @ matrix[:, :rank] - offset[:rank])

    def reconstruct(self, augmented: FloatArray, by: Fold, rows: slice) -> FloatArray:
        """(tokens, 1 + rank) -> (tokens, rows), float32."""
        with self._lock:
            if by not in self._decode:
                self._decode[by] = self._put(by.decode)
            decode = self._decode[by]
        with self._turn, mx.stream(self._device):
            return self._host(mx.array(augmented) @ decode[rows, : augmented.shape[1]].T)

    def _put(self, matrix: FloatArray) -> mx.array:
        with mx.stream(self._device):
            made = mx.array(matrix)
            mx.eval(made)
            return made

    def _host(self, result: mx.array) -> FloatArray:
        mx.eval(result)
        return np.array(result)


def device_products() -> Products | None:
    """Products on the default device where it is a GPU; None: numpy is as fast.

    A page's products are 10 GFLOP: on a GPU milliseconds, and the CPU stays free.
    """
    return DeviceProducts() if mx.default_device().type == mx.gpu else None
