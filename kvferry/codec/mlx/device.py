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
from kvferry.codec.transform import Fold, Products


class DeviceProducts:
    """`Products` on an MLX device. Any thread may call it."""

    def __init__(self, device: mx.Device | None = None) -> None:
        self._device = device or mx.default_device()
        self._kept: WeakKeyDictionary[Fold, tuple[mx.array, mx.array, mx.array]] = (
            WeakKeyDictionary()
        )
        self._lock = Lock()
        self._turn = Lock()  # a device does one product at a time anyway

    def project(self, x: FloatArray, by: Fold, rank: int) -> FloatArray:
        """(tokens, p) -> (tokens, rank), float32."""
        encode, offset, _ = self._matrices(by)
        with self._turn, mx.stream(self._device):
            return self._host(mx.array(x) @ encode[:, :rank] - offset[:rank])

    def reconstruct(self, augmented: FloatArray, by: Fold, rows: slice) -> FloatArray:
        """(tokens, 1 + rank) -> (tokens, rows), float32."""
        decode = self._matrices(by)[2]
        with self._turn, mx.stream(self._device):
            return self._host(mx.array(augmented) @ decode[rows, : augmented.shape[1]].T)

    def _matrices(self, by: Fold) -> tuple[mx.array, mx.array, mx.array]:
        with self._lock:
            if by not in self._kept:
                with mx.stream(self._device):
                    made = mx.array(by.encode), mx.array(by.offset), mx.array(by.decode)
                    mx.eval(made)
                self._kept[by] = made
            return self._kept[by]

    def _host(self, result: mx.array) -> FloatArray:
        mx.eval(result)
        return np.array(result)


def device_products() -> Products | None:
    """Products on the default device where it is a GPU; None: numpy is as fast.

    A page's products are 10 GFLOP: on a GPU milliseconds, and the CPU stays free.
    """
    return DeviceProducts() if mx.default_device().type == mx.gpu else None
