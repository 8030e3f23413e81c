"""What the transform codec learned about a model, and how it is stored, cut and found.

A `GroupCalibration` covers one layer group (or a cut of one) and is what blobs name by
id. A `CalibrationSet` lists the groups of a model with the measured rate-distortion
curve. Both are stored as containers of kind calibration, addressed by their content.
"""

from kvferry.codec.calibration_bundle import BundleCalibration, StreamPart
from kvferry.codec.calibration_curve import (
    CurvePoint,
    Prediction,
    RateDistortion,
    StreamCurve,
    TextCurve,
    step_on_curve,
)
from kvferry.codec.calibration_fit import (
    DEFAULT_MAX_RANK,
    MAX_GROUP_WIDTH,
    GroupAccumulator,
    fit_group,
    layer_groups,
)
from kvferry.codec.calibration_group import GroupCalibration
from kvferry.codec.calibration_set import CalibrationSet, GroupEntry

__all__ = [
    "DEFAULT_MAX_RANK",
    "MAX_GROUP_WIDTH",
    "BundleCalibration",
    "CalibrationSet",
    "CurvePoint",
    "GroupAccumulator",
    "GroupCalibration",
    "GroupEntry",
    "Prediction",
    "RateDistortion",
    "StreamCurve",
    "StreamPart",
    "TextCurve",
    "fit_group",
    "layer_groups",
    "step_on_curve",
]
