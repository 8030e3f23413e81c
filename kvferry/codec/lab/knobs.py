"""The one option of each codec that trades bytes for fidelity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec.affine import BITS
from kvferry.codec.bitpack import BITS as BITPACK_BITS
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.lab.calibrate import steps_for_bits
from kvferry.codec.registry import codec_names
from kvferry.errors import ConfigError

Options = Mapping[str, object]
# Estimated bits per value of the steps that a curve is drawn through.
_CURVE_BITS = (1.6, 1.0, 0.7, 0.5, 0.38, 0.28, 0.2, 0.14)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """What can be turned on a codec.

    Attributes:
        codec: its name.
        option: what is turned; empty for a codec without loss, which has one setting.
        settings: values from fine to coarse: all there are, or those for a curve where
            any number between 0 and infinity can be set.
        free: any number can be set; a larger one is coarser.
    """

    codec: str
    option: str = ""
    settings: tuple[float, ...] = (0.0,)
    free: bool = False

    def options(self, value: float) -> Options:
        """As `make_codec` takes them, numbers with five digits."""
        if not self.option:
            return {}
        rounded = float(f"{value:.5g}")
        return {self.option: int(rounded) if rounded.is_integer() else rounded}


def knob_of(codec: str, groups: Sequence[GroupCalibration] = ()) -> Knob:
    """The knob of a codec.

    Args:
        groups: the model's calibration, for codecs whose settings depend on it.
    Raises: ConfigError: a codec that is not known, or has nothing to turn yet.
    """
    if codec in ("raw", "zstd"):
        return Knob(codec=codec)
    if codec == "affine":
        return Knob(codec=codec, option="bits", settings=tuple(sorted(BITS, reverse=True)))
    if codec == "bitpack":
        return Knob(codec=codec, option="bits", settings=tuple(sorted(BITPACK_BITS, reverse=True)))
    if codec == "ferry":
        steps = tuple(steps_for_bits(groups, _CURVE_BITS)) if groups else ()
        return Knob(codec=codec, option="step", settings=steps, free=True)
    if codec == "kvtc":
        ratios = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
        return Knob(codec=codec, option="ratio", settings=ratios, free=True)
    if codec in ("streaming", "random"):
        return Knob(codec=codec, option="ratio", settings=(2.0, 4.0, 8.0, 16.0, 32.0), free=True)
    raise ConfigError("codec", codec, f"one of {', '.join(codec_names())}")
