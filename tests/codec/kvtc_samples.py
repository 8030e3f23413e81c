"""Calibrations of the published codec that its tests share."""

import numpy as np
from codec_samples import random_calibration

from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.kvtc_calibration import KvtcCalibration, StreamErrors
from kvferry.codec.kvtc_quantize import measured_errors


def with_errors(known: GroupCalibration, tokens: int = 200, seed: int = 5) -> KvtcCalibration:
    """Errors of Gaussian coefficients with the calibration's deviations."""
    rng = np.random.default_rng(seed)
    errors = {}
    for name, stream in known.bundles.items():
        z = rng.standard_normal((tokens, stream.rank), dtype=np.float32) * stream.sigma
        errors[name] = StreamErrors(*measured_errors(z))
    return KvtcCalibration.of(known, errors)


def kvtc_calibration(**shape: object) -> KvtcCalibration:
    """As `random_calibration`."""
    return with_errors(random_calibration(joint=False, **shape))  # type: ignore[arg-type]
