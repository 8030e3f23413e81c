"""Codecs that have nothing to learn of a model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Self

from kvferry.codec import options as opts
from kvferry.codec.base import CalibrationLike, PageTensors
from kvferry.codec.calibration import CurvePoint, GroupCalibration


class Uncalibrated:
    """The part of `Codec` that is about calibrations, for codecs without any."""

    __slots__ = ()
    name: ClassVar[str]

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object],
        calibration: GroupCalibration | None,
        curve: Sequence[CurvePoint],
    ) -> Self:
        """See `parse`: calibration and curve tell it nothing. Raises: ConfigError."""
        return cls.parse(options)

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """From options as text; a codec that has any says so. Raises: ConfigError."""
        opts.check_names(cls.name, options, ())
        return cls()

    @property
    def calibration_id(self) -> bytes:
        """None."""
        return b""

    def fit(self, sample: Iterable[PageTensors]) -> CalibrationLike | None:
        """Nothing to learn."""
        return None
