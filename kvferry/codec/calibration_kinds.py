"""A calibration of a layer group from its blob, whichever codec it is for."""

from kvferry.codec.calibration_format import LOWRANK_NAME
from kvferry.codec.calibration_group import GroupCalibration
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.proto.container import DEFAULT_LIMITS, Limits, read_header


def group_from_blob(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> GroupCalibration:
    """What the blob's header says it is: a `LowRankCalibration`, or one with bundles.

    Raises: CorruptBlobError, CalibrationCorruptError, UnsupportedVersionError.
    """
    if read_header(data, None, limits).codec.name == LOWRANK_NAME:
        return LowRankCalibration.from_blob(data, limits)
    return GroupCalibration.from_blob(data, limits)
