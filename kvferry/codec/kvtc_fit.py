"""From pages of a model to a calibration of `kvtc`."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvferry.codec.base import FloatArray, PageTensors
from kvferry.codec.basis import eigenbasis
from kvferry.codec.calibration import GroupAccumulator, GroupCalibration
from kvferry.codec.calibration_bundle import StreamPart, bundle_calibration
from kvferry.codec.kvtc_calibration import KvtcCalibration, StreamErrors
from kvferry.codec.kvtc_quantize import measured_errors
from kvferry.codec.rows import page_rows
from kvferry.codec.transform import project
from kvferry.errors import ConfigError, UnsupportedTensorError
from kvferry.proto.keys import SINK_TOKENS

# The covariance of a stream is this square, in float64: 1.2 GB.
MAX_WIDTH = 12_288
# All bases together, as float16, stay within what a calibration blob may hold.
MAX_BASIS_BYTES = 240 << 20
KEPT_ROWS = 1024
_APART_STRIDE = 3


@dataclass(frozen=True, slots=True)
class RowsAside:
    """Rows on which errors will be measured: stream name -> (rows, p) float32.

    Attributes:
        kept: of the tokens fitted on, every ``stride``-th of ``count``.
        apart: of other texts.
    """

    kept: Mapping[str, FloatArray]
    apart: Mapping[str, FloatArray]
    stride: int
    count: int

    @staticmethod
    def apart_rows(tokens: int) -> int:
        """Rows that are taken of a text apart of so many tokens."""
        return -(-max(tokens - SINK_TOKENS, 0) // _APART_STRIDE)


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

    def set_aside(self) -> "RowsAside":
        """What was kept beside the sums, to go on from."""
        return RowsAside(self._kept, self._apart, self._stride, self._count)

    def take_back(self, rows: "RowsAside") -> None:
        """Go on from what `set_aside` gave; the sums are the accumulator's own."""
        self._kept, self._apart = dict(rows.kept), dict(rows.apart)
        self._stride, self._count = rows.stride, rows.count

    @property
    def kept(self) -> Mapping[str, FloatArray]:
        """Stream name -> (rows, p) on which errors will be measured: of pages apart, else
        `KEPT_ROWS` to twice as many spread evenly over the tokens fitted on."""
        return self._apart or self._kept

    def fit(self, name: str, source: str) -> GroupCalibration:
        """The basis of one stream by PCA, as a calibration of nothing else.

        The covariance's eigenvectors are what the SVD of the centred data would give,
        without the data. Exact rather than randomized (as published): at a rank near the
        width it is also the faster one.
        Raises: UnsupportedTensorError: too little was seen.
        """
        seen = self._seen
        total = sum(accumulator.width for accumulator in seen.bundles.values())
        bundle = bundle_calibration(
            [StreamPart(name=name, heads=seen.shapes[name][0], dim=seen.shapes[name][1])],
            eigenbasis(seen.bundles[name], MAX_BASIS_BYTES // (2 * total)),
        )
        return seen.calibration({name: bundle}, source)

    def finish(
        self, source: str, fitted: Mapping[str, GroupCalibration] | None = None
    ) -> KvtcCalibration:
        """Bases, then errors and plans.

        Args:
            fitted: stream -> what `fit` gave; what is missing is fitted.
        Raises: UnsupportedTensorError: too little was seen.
        """
        seen, fitted = self._seen, fitted or {}
        if not seen.bundles:
            raise UnsupportedTensorError("*", "no tokens to calibrate on")
        made = {name: fitted.get(name) or self.fit(name, source) for name in seen.bundles}
        bundles = {name: group.bundles[name] for name, group in made.items()}
        group = seen.calibration(bundles, source)
        errors = {}
        for name, bundle in group.bundles.items():
            z = project(self.kept[name], bundle.fold, bundle.rank)
            errors[name] = StreamErrors(*measured_errors(z))
        return KvtcCalibration.of(group, errors).planned()
