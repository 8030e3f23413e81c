"""All codecs by name, and options from text."""

from collections.abc import Mapping, Sequence

from kvferry.codec.affine import AffineCodec
from kvferry.codec.base import Codec, drops_tokens
from kvferry.codec.bitpack import BitpackCodec
from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.centroid import CentroidCodec
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.kvtc import KvtcCodec
from kvferry.codec.lowrank import LowRankCodec
from kvferry.codec.random_share import RandomCodec
from kvferry.codec.raw import RawCodec, ZstdCodec
from kvferry.codec.streaming import StreamingCodec
from kvferry.errors import ConfigError, UnknownCodecError, UnsupportedVersionError

CodecClass = (
    type[RawCodec]
    | type[ZstdCodec]
    | type[AffineCodec]
    | type[BitpackCodec]
    | type[FerryCodec]
    | type[KvtcCodec]
    | type[CentroidCodec]
    | type[StreamingCodec]
    | type[RandomCodec]
    | type[LowRankCodec]
)

CODECS: Mapping[str, CodecClass] = {
    "raw": RawCodec,
    "zstd": ZstdCodec,
    "affine": AffineCodec,
    "bitpack": BitpackCodec,
    "ferry": FerryCodec,
    "kvtc": KvtcCodec,
    "centroid": CentroidCodec,
    "streaming": StreamingCodec,
    "random": RandomCodec,
    "lowrank": LowRankCodec,
}


def make_codec(
    name: str,
    options: Mapping[str, object],
    calibration: GroupCalibration | None = None,
    curve: Sequence[CurvePoint] = (),
) -> Codec:
    """A codec that can encode.

    Options may be text, as they come from a command line or a policy: ``step`` or
    ``target_kl`` (ferry; ``target_kl`` needs ``curve``), ``bits`` (affine, bitpack),
    ``page_size_kb`` (bitpack), ``level`` (zstd), ``ratio`` and ``entropy`` (kvtc), ``ratio``
    or ``similarity``, ``window``, ``persistence``, ``min_merge``, ``init_preserve`` and
    ``flush`` (centroid), ``ratio`` or ``window``, ``sinks`` and ``positions`` (streaming),
    ``ratio`` or ``keep``, ``sinks``, ``seed`` and ``positions`` (random),
    those of `LowRankOptions` (lowrank).

    Raises: ConfigError (one line that lists what exists);
        CalibrationMissingError for a codec that needs one.
    """
    if name not in CODECS:
        raise ConfigError("codec", name, f"one of {', '.join(CODECS)}")
    return CODECS[name].from_options(options, calibration, curve)


def reader(name: str, version: int) -> Codec:
    """A codec that can decode what ``name``.``version`` wrote.

    Raises: UnknownCodecError, UnsupportedVersionError.
    """
    if name not in CODECS:
        raise UnknownCodecError(name, codec_names())
    found = CODECS[name]
    if version != found.version:
        raise UnsupportedVersionError(f"codec {name}", version, found.version)
    return found()


def codec_names() -> tuple[str, ...]:
    """Names that `make_codec` knows."""
    return tuple(CODECS)


def restorable(name: str) -> bool:
    """Whether blobs of a codec have all their tokens, so that a hook may put them back.

    Names that are not known count as such: their blobs are refused when they are read.
    """
    return name not in CODECS or not drops_tokens(CODECS[name])


def restorable_names() -> frozenset[str]:
    """Those known codecs whose blobs have all their tokens."""
    return frozenset(name for name in CODECS if restorable(name))
