"""The one option of each codec that trades bytes for fidelity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec.affine import BITS
from kvferry.codec.bitpack import BITS as BITPACK_BITS
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.lab.calibrate import steps_for_bits
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.lowrank_options import LowRankOptions
from kvferry.codec.registry import codec_names
from kvferry.errors import ConfigError

Options = Mapping[str, object]
# Estimated bits per value of the steps that a curve is drawn through.
_CURVE_BITS = (1.6, 1.0, 0.7, 0.5, 0.38, 0.28, 0.2, 0.14)
_SAME_AS_RATIO = {"streaming": "window", "random": "keep", "centroid": "similarity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """What can be turned on a codec.

    Attributes:
        codec: its name.
        option: what is turned; empty for a codec without loss, which has one setting.
        settings: values from fine to coarse: all there are, or those for a curve where
            any number between 0 and infinity can be set.
        free: any number can be set; a larger one is coarser.
        table: settings with several options each, from large blobs to small; ``settings``
            are then places in it, and need not be finer the larger they are.
        instead: other options that decide the same, so may not be given beside it.
    """

    codec: str
    option: str = ""
    settings: tuple[float, ...] = (0.0,)
    free: bool = False
    table: Sequence[Options] = ()
    instead: tuple[str, ...] = ()

    def rest(self, options: Options) -> Options:
        """Those that say nothing about what is turned."""
        turned = {self.option, *self.instead, *(name for row in self.table for name in row)}
        return {name: value for name, value in options.items() if name not in turned}

    def options(self, value: float) -> Options:
        """As `make_codec` takes them, numbers with five digits."""
        if self.table:
            return self.table[int(value)]
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
        return Knob(codec=codec, option="step", settings=steps, free=True, instead=("target_kl",))
    if codec == "kvtc":
        ratios = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
        return Knob(codec=codec, option="ratio", settings=ratios, free=True)
    if codec in _SAME_AS_RATIO:
        powers, instead = (2.0, 4.0, 8.0, 16.0, 32.0), (_SAME_AS_RATIO[codec],)
        return Knob(codec=codec, option="ratio", settings=powers, free=True, instead=instead)
    if codec == "lowrank":
        return lowrank_knob(groups)
    raise ConfigError("codec", codec, f"one of {', '.join(codec_names())}")


def lowrank_knob(
    groups: Sequence[GroupCalibration] = (),
    ranks: Sequence[int] = (),
    bits: Sequence[int] = (16, 8),
    target: str = "v",
) -> Knob:
    """All ranks with all widths of coefficients, by the bytes that they take.

    Args:
        groups: the model's calibration, for the values of a head.
        ranks: default: shares of a head's directions from 15/16 to 1/4.
    Raises: ConfigError: ranks, bits or a target that cannot be.
    """
    for rank in ranks or (1,):
        for width in bits:
            LowRankOptions.parse({"rank": rank, "bits": width, "target": target})
    known = [group for group in groups if isinstance(group, LowRankCalibration)]
    dim = min((basis.dim for group in known for basis in group.bases.values()), default=64)
    for rank in ranks:
        if known and rank > dim:
            raise ConfigError("ranks", rank, f"at most {dim}, the values of a head")
    wanted = ranks or [max(1, dim * share // 16) for share in (15, 14, 12, 8, 4)]
    pairs = sorted({(rank * width, width, rank) for rank in wanted for width in bits})[::-1]
    table = [{"rank": rank, "bits": width, "target": target} for _, width, rank in pairs]
    settings = tuple(float(place) for place in range(len(table)))
    instead = ("policy",)
    return Knob(codec="lowrank", option="rank", settings=settings, table=table, instead=instead)
