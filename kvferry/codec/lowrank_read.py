"""Reading `lowrank` blobs: parameters and lengths checked, then values again."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.codec import sections as sec
from kvferry.codec.base import (
    CalibrationSource,
    DType,
    FloatArray,
    PageTensors,
    Stream,
    Wanted,
)
from kvferry.codec.calibrated import Span, named_calibration, read_sink_count
from kvferry.codec.entropy import unpack_bits
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.lowrank_heads import dequantize, reconstruct
from kvferry.codec.lowrank_options import BITS
from kvferry.codec.rows import store_values
from kvferry.codec.sinks import check_sinks, read_sinks
from kvferry.errors import CorruptBlobError
from kvferry.proto.container import SectionData

PARAMS = ("bits", "identity", "rank", "sinks")
_TOO_LARGE = 1e38

Sections = Mapping[str, SectionData]
Layers = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Reading:
    """The checked parameters of a blob.

    Attributes:
        rank: coded stream -> directions.
        exact: (layers,), which layers stay exact in coded streams.
        span: what of its tokens is exact, what is coded.
    """

    bits: int
    rank: Mapping[str, int]
    exact: Layers
    span: Span

    def coded(self, name: str) -> Layers:
        """Which layers of a stream are coded."""
        return ~self.exact if name in self.rank else np.zeros_like(self.exact)


def decode_page(wanted: Wanted, sections: Sections, calibrations: CalibrationSource) -> PageTensors:
    """See `kvferry.codec.base.Codec.decode`.

    Raises: CorruptBlobError, CalibrationMissingError, IdentityMismatchError.
    """
    known = named_calibration(wanted, calibrations)
    if not isinstance(known, LowRankCalibration):
        raise CorruptBlobError("calibration id", "names a calibration of another codec")
    reading = _reading(wanted, known)
    _check_sections(wanted, sections, reading)
    streams = {}
    for name in known.streams:
        data = _stream(name, wanted, sections, known, reading)
        streams[name] = Stream(name, data, wanted.dtypes[name])
    return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams)


def _reading(wanted: Wanted, known: LowRankCalibration) -> _Reading:
    sec.check_params(wanted, PARAMS)
    bits = sec.integer(wanted, "bits", min(BITS), max(BITS))
    rank, identity = wanted.params["rank"], wanted.params["identity"]
    if bits not in BITS:
        raise CorruptBlobError("codec parameters", "'bits' is neither 8 nor 16")
    if not isinstance(rank, dict) or not rank or not set(rank) <= set(known.bases):
        raise CorruptBlobError("codec parameters", "'rank' is not one number per coded stream")
    for name, value in rank.items():
        if type(value) is not int or not 1 <= value <= known.bases[name].dim:
            raise CorruptBlobError("codec parameters", f"rank {value!r} of stream {name!r}")
    first, end = wanted.layers
    if (
        not isinstance(identity, list)
        or any(type(n) is not int or not first <= n < end for n in identity)
        or identity != sorted(set(identity))
    ):
        raise CorruptBlobError("codec parameters", "'identity' is not some of the blob's layers")
    exact = np.isin(np.arange(first, end), identity)
    return _Reading(bits, rank, exact, Span.of(wanted.tokens, read_sink_count(wanted)))


def _check_sections(wanted: Wanted, sections: Sections, reading: _Reading) -> None:
    """Names, and lengths before anything is decoded. Raises: CorruptBlobError."""
    span, names = reading.span, []
    for name in wanted.shapes:
        coded = reading.coded(name)
        names += [f"{name}/exact"] * (not coded.all())
        if coded.any():
            names += [f"{name}/sinks"] * bool(span.exact)
            names += [f"{name}/q"] * bool(span.coded)
            names += [f"{name}/scales"] * bool(span.coded and reading.bits == 8)
    sec.check_names(sections, names)
    for name, (_, heads, tokens, dim) in wanted.shapes.items():
        coded, dtype = reading.coded(name), wanted.dtypes[name]
        count, left = int(coded.sum()) * heads, int((~coded).sum()) * heads
        if left:
            check_sinks(sections[f"{name}/exact"], left * tokens * dim, dtype)
        if count and span.exact:
            check_sinks(sections[f"{name}/sinks"], count * span.exact * dim, dtype)
        if count and span.coded:
            values = count * reading.rank[name]
            sec.check_raw(sections[f"{name}/q"], values * span.coded * reading.bits // 8)
            if reading.bits == 8:
                sec.check_raw(sections[f"{name}/scales"], values * 4)


def _stream(
    name: str, wanted: Wanted, sections: Sections, known: LowRankCalibration, reading: _Reading
) -> npt.NDArray[np.generic]:
    """The wanted layers of a stream, (layers, heads, tokens, dim) in its own dtype."""
    layers, dtype, span = sec.layer_slice(wanted), wanted.dtypes[name], reading.span
    _, heads, tokens, dim = wanted.shapes[name]
    coded = reading.coded(name)
    here = coded[layers]
    out = np.empty((layers.stop - layers.start, heads, tokens, dim), dtype=dtype.storage)
    if not here.all():
        whole = (int((~coded).sum()), heads, tokens, dim)
        out[~here] = read_sinks(sections[f"{name}/exact"], whole, dtype)[_within(~coded, layers)]
    if not here.any():
        return out
    if span.exact:
        whole = (int(coded.sum()), heads, span.exact, dim)
        sinks = read_sinks(sections[f"{name}/sinks"], whole, dtype)
        out[here, :, : span.exact] = sinks[_within(coded, layers)]
    if span.coded:
        out[here, :, span.exact :] = _values(name, sections, known, reading, layers, dtype)
    return out


def _within(chosen: Layers, layers: slice) -> Layers:
    """Of the layers that ``chosen`` holds side by side, which lie in ``layers``."""
    place = np.zeros_like(chosen)
    place[layers] = True
    return place[chosen]


def _values(
    name: str,
    sections: Sections,
    known: LowRankCalibration,
    reading: _Reading,
    layers: slice,
    dtype: DType,
) -> npt.NDArray[np.generic]:
    """Coded tokens of the wanted coded layers, RoPE redone."""
    coded, rank, span = reading.coded(name), reading.rank[name], reading.span
    mine = _within(coded, layers)
    found = _coefficients(name, sections, reading, known.streams[name].heads)[mine]
    place = np.flatnonzero(coded)[mine]
    basis = known.bases[name].keep(rank)
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        chosen = type(basis)(
            mean=basis.mean[place], vectors=basis.vectors[place], variances=basis.variances[place]
        )
        values = reconstruct(found, chosen)
    if not np.abs(values).max(initial=0.0) < _TOO_LARGE:  # also true of NaN
        raise CorruptBlobError(f"stream {name!r}", "decodes to NaN or infinite values")
    out = np.empty(values.shape, dtype=dtype.storage)
    ropes = known.ropes.get(name)
    store_values(
        out, dtype, values, None if ropes is None else [ropes[n] for n in place], span.tokens
    )
    return out


def _coefficients(name: str, sections: Sections, reading: _Reading, heads: int) -> FloatArray:
    """(coded layers, heads, tokens, rank) float32. Raises: CorruptBlobError."""
    section = sections[f"{name}/q"]
    lead = (int(reading.coded(name).sum()), heads, reading.rank[name])
    kind = np.dtype("<f2" if reading.bits == 16 else "i1")
    packed = unpack_bits(
        section.data, (*lead, reading.span.coded), kind, f"section {section.name!r}"
    )
    if reading.bits == 16:
        return packed.swapaxes(-1, -2).astype(np.float32)
    part = sections[f"{name}/scales"]
    scales = unpack_bits(
        part.data, (*lead[:2], 1, lead[2]), np.dtype("<f4"), f"section {part.name!r}"
    ).astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise CorruptBlobError(f"section {part.name!r}", "holds a scale that cannot be")
    with np.errstate(over="ignore"):
        return dequantize(packed.swapaxes(-1, -2).astype(np.int8), scales)
