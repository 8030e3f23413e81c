"""From pages of a model to a calibration of `kvtc`."""

from collections.abc import Mapping

import numpy as np

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.calibration import GroupAccumulator
from kvferry.codec.calibration_bundle import StreamPart, bundle_calibration
from kvferry.codec.kvtc_calibration import KvtcCalibration, StreamErrors
from kvferry.codec.kvtc_quantize import measured_errors
from kvferry.codec.rows import page_rows
from kvferry.codec.transform import eigenbasis, project
from kvferry.errors import ConfigError, UnsupportedTensorError
from kvferry.proto.keys import SINK_TOKENS

# The covariance of a stream is this square, in float64: 1.2 GB.
MAX_WIDTH = 12_288
# All bases together, as float16, stay within what a calibration blob may hold.
MAX_BASIS_BYTES = 240 << 20
KEPT_ROWS = 1024
_APART_STRIDE = 3


class KvtcFit:
    """Collects pages that cover all layers and heads; then `finish`.

    A basis holds more of the text that it was fitted on than of any other: with 16,000
    tokens for 5,760 directions, five times less of that text's energy falls into the
    last half. So errors are measured on pages apart, where there are any (`measure_on`):
    1 to 3 % fewer bytes at the same ratio; KL moved by less than that between texts.

    Memory: one covariance per stream, and the rows on which errors are measured.
    """

    def __init__(self, seen: GroupAccumulator) -> None:
        """``seen``: an empty one, whose streams are not joint. Raises: ConfigError."""
        if seen.joint:
            raise ConfigError("joint", seen.joint, "False for kvtc: a basis for each stream")
        self._seen = seen
        self._kept: dict[str, FloatArray] = {}
        self._apart: dict[str, FloatArray] = {}
        self._stride = 1
        self._count = 0

    def add(self, page: PageTensors) -> None:
        """Take in a page of any length to fit on.

        Raises: UnsupportedTensorError; ConfigError: a model too wide for one basis.
        """
        for name, stream in page.streams.items():
            width = stream.data.size // stream.data.shape[2]
            if width > MAX_WIDTH:
                limit = f"at most {MAX_WIDTH:,} (layers x heads x dim) for kvtc; use ferry"
                raise ConfigError(f"width of {name}", width, limit)
        self._seen.add(page)
        first = max(page.tokens[0], SINK_TOKENS)
        count = page.tokens[1] - first
        if count <= 0:
            return
        for name in page.streams:
            rows = page_rows(page, [name], self._seen.ropes, first)
            kept = rows[-self._count % self._stride :: self._stride]
            before = self._kept.get(name, kept[:0])
            self._kept[name] = np.concatenate([before, kept])
        self._count += count
        while len(next(iter(self._kept.values()))) > 2 * KEPT_ROWS:
            self._kept = {name: rows[::2].copy() for name, rows in self._kept.items()}
            self._stride *= 2

    def measure_on(self, page: PageTensors) -> None:
        """Take in a page to measure errors on, and not to fit on; every third token."""
        first = max(page.tokens[0], SINK_TOKENS)
        for name in page.streams:
            rows = page_rows(page, [name], self._seen.ropes, first)[::_APART_STRIDE]
            before = self._apart.get(name, rows[:0])
            self._apart[name] = np.concatenate([before, rows])

    @property
    def kept(self) -> Mapping[str, FloatArray]:
        """Stream name -> (rows, p) on which errors will be measured: of pages apart, else
        `KEPT_ROWS` to twice as many spread evenly over the tokens fitted on."""
        return self._apart or self._kept

    def finish(self, source: str) -> KvtcCalibration:
        """Bases by PCA, then errors and plans.

        The covariance's eigenvectors are what the SVD of the centred data would give,
        without the data. Exact rather than randomized (as published): at a rank near the
        width it is also the faster one.
        Raises: UnsupportedTensorError: too little was seen.
        """
        seen = self._seen
        if not seen.bundles:
            raise UnsupportedTensorError("*", "no tokens to calibrate on")
        total = sum(accumulator.width for accumulator in seen.bundles.values())
        bundles = {
            name: bundle_calibration(
                [StreamPart(name=name, heads=seen.shapes[name][0], dim=seen.shapes[name][1])],
                eigenbasis(accumulator, MAX_BASIS_BYTES // (2 * total)),
            )
            for name, accumulator in seen.bundles.items()
        }
        group = seen.calibration(bundles, source)
        errors = {}
        for name, bundle in group.bundles.items():
            z = project(self.kept[name], bundle.fold, bundle.rank)
            errors[name] = StreamErrors(*measured_errors(z))
        return KvtcCalibration.of(group, errors).planned()
