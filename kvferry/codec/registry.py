"""All codecs by name, and options from text."""

from collections.abc import Mapping, Sequence

from kvferry.codec.base import Codec
from kvferry.codec.calibration import CurvePoint, GroupCalibration


def make_codec(
    name: str,
    options: Mapping[str, object],
    calibration: GroupCalibration | None = None,
    curve: Sequence[CurvePoint] = (),
) -> Codec:
    """A codec that can encode.

    Options may be text, as they come from a command line or a policy: ``step`` and
    ``target_kl`` (ferry; ``target_kl`` needs ``curve``), ``bits`` (affine), ``level``
    (zstd).

    Raises: UnknownCodecError; ConfigError (one line that lists what exists);
        CalibrationMissingError for a codec that needs one.
    """
    raise NotImplementedError


def reader(name: str, version: int) -> Codec:
    """A codec that can decode what ``name``.``version`` wrote.

    Raises: UnknownCodecError, UnsupportedVersionError.
    """
    raise NotImplementedError


def codec_names() -> tuple[str, ...]:
    """Names that `make_codec` knows."""
    raise NotImplementedError
