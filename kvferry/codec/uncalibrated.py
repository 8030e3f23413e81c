"""Codecs that have nothing to learn of a model."""

from collections.abc import Iterable

from kvferry.codec.base import CalibrationLike, PageTensors


class Uncalibrated:
    """The part of `Codec` that is about calibrations, for codecs without any."""

    __slots__ = ()

    @property
    def calibration_id(self) -> bytes:
        """None."""
        return b""

    def fit(self, sample: Iterable[PageTensors]) -> CalibrationLike | None:
        """Nothing to learn."""
        return None
