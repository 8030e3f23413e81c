"""What codecs over a layer group's calibration share: it is there, it fits the page, and
the first tokens of a sequence go apart from the coded ones, both ways.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kvferry.codec import sections as sec
from kvferry.codec.base import CalibrationSource, CodedPage, FloatArray, PageTensors, Wanted
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.rows import store_rows
from kvferry.codec.sinks import check_sinks, pack_sinks, read_sinks, sink_count
from kvferry.errors import (
    CalibrationMissingError,
    CorruptBlobError,
    IdentityMismatchError,
    UnsupportedTensorError,
)
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

_MAX_SINKS = 4096
_TOO_LARGE = 1e38


class Calibrated:
    """A codec with a field ``calibration``, None where it only decodes."""

    __slots__ = ()
    calibration: GroupCalibration | None

    @property
    def calibration_id(self) -> bytes:
        """Id of the calibration of just these layers and heads; its part that readers need."""
        return self._known.id

    @property
    def _known(self) -> GroupCalibration:
        if self.calibration is None:
            raise CalibrationMissingError("")
        return self.calibration


@dataclass(frozen=True, slots=True)
class Span:
    """A page's tokens: how many are exact, how many coded, and which the coded are."""

    exact: int
    coded: int
    tokens: tuple[int, int]

    @classmethod
    def of(cls, tokens: tuple[int, int], sinks: int) -> Self:
        """``sinks``: tokens at a sequence's start that are exact."""
        exact = sink_count(tokens, sinks)
        return cls(exact, tokens[1] - tokens[0] - exact, (tokens[0] + exact, tokens[1]))


def split_page(page: PageTensors, known: GroupCalibration) -> tuple[Span, dict[str, SectionData]]:
    """What is to be coded of a page, and its exact tokens: stream -> section; maybe none.

    Raises: UnsupportedTensorError for another range than the calibration's, and for
        streams that it lacks.
    """
    if (page.layers, page.heads) != (known.layers, known.heads):
        raise UnsupportedTensorError("*", f"layers {page.layers} differ from the calibration's")
    if set(page.streams) != set(known.streams):
        raise UnsupportedTensorError("*", f"streams {sorted(page.streams)} are not calibrated")
    span = Span.of(page.tokens, SINK_TOKENS)
    sections = {}
    for name, part in known.streams.items():
        stream = page.streams[name]
        if stream.data.shape[1::2] != (part.heads, part.dim):
            raise UnsupportedTensorError(name, f"shape {stream.data.shape} is not calibrated")
        if span.exact:
            sections[name] = pack_sinks(f"{name}/sinks", stream, span.exact)
    return span, sections


def calibration_of(wanted: Wanted, calibrations: CalibrationSource) -> GroupCalibration:
    """The calibration that a blob names, if it fits the blob and has bases of whole groups.

    Raises: CalibrationMissingError, CorruptBlobError, IdentityMismatchError.
    """
    known = named_calibration(wanted, calibrations)
    if not known.bundles:
        raise CorruptBlobError("calibration id", "names a calibration of another codec")
    return known


def named_calibration(wanted: Wanted, calibrations: CalibrationSource) -> GroupCalibration:
    """The calibration that a blob names, if it fits the blob, whichever codec it is for.

    Raises: as `calibration_of`.
    """
    if not wanted.calibration_id:
        raise CorruptBlobError("calibration id", "is empty")
    known = calibrations.get(wanted.calibration_id)
    if not isinstance(known, GroupCalibration):
        raise CorruptBlobError("calibration id", "names no calibration of a layer group")
    if (known.layers, known.heads) != (wanted.layers, wanted.heads):
        found = f"layers {known.layers}, heads {known.heads}"
        raise IdentityMismatchError("calibration", found, f"{wanted.layers}, {wanted.heads}")
    if known.rope_fingerprint != wanted.rope_fingerprint:
        found = wanted.rope_fingerprint.hex()[:16]
        raise IdentityMismatchError("rope", found, known.rope_fingerprint.hex()[:16])
    if set(known.streams) != set(wanted.shapes):
        raise CorruptBlobError("streams", f"{sorted(wanted.shapes)} are not calibrated")
    for name, shape in wanted.shapes.items():
        if shape[1::2] != (known.streams[name].heads, known.streams[name].dim):
            raise CorruptBlobError(f"stream {name!r}", f"shape {shape} is not calibrated")
    return known


def read_sink_count(wanted: Wanted) -> int:
    """Exact tokens at a sequence's start, from parameters. Raises: CorruptBlobError."""
    return sec.integer(wanted, "sinks", 0, _MAX_SINKS)


def check_exact(wanted: Wanted, sections: Mapping[str, SectionData], exact: int) -> None:
    """Lengths of the sections of ``exact`` tokens. Raises: CorruptBlobError."""
    if not exact:
        return
    for name, (layers, heads, _, dim) in wanted.shapes.items():
        section = sections[f"{name}/sinks"]
        check_sinks(section, layers * heads * exact * dim, wanted.dtypes[name])


def join_tokens(
    name: str, rows: FloatArray, pages: Sequence[CodedPage], known: GroupCalibration, sinks: int
) -> npt.NDArray[np.generic]:
    """A stream of consecutive checked pages: exact tokens, and coded ones with RoPE redone.

    Args:
        rows: coded tokens of all pages, RoPE undone, (tokens, width of the wanted layers).
        sinks: as `Span.of` takes it.
    Returns: (wanted layers, heads, tokens of all pages, dim) in the blobs' own dtype.
    Raises: CorruptBlobError.
    """
    _check_finite(rows, name)
    first = pages[0].wanted
    dtype, layers, part = first.dtypes[name], sec.layer_slice(first), known.streams[name]
    tokens = sum(page.wanted.tokens[1] - page.wanted.tokens[0] for page in pages)
    count = layers.stop - layers.start
    out = np.empty((count, part.heads, tokens, part.dim), dtype=dtype.storage)
    ropes = known.ropes.get(name)
    ropes = None if ropes is None else ropes[layers]
    at = row = 0
    for page in pages:
        span = Span.of(page.wanted.tokens, sinks)
        if span.exact:
            whole = (page.wanted.shapes[name][0], part.heads, span.exact, part.dim)
            exact = read_sinks(page.sections[f"{name}/sinks"], whole, dtype)
            out[:, :, at : at + span.exact] = exact[layers]
        at += span.exact
        if span.coded:
            coded = rows[row : row + span.coded]
            store_rows(out[:, :, at : at + span.coded], dtype, coded, ropes, span.tokens)
        at += span.coded
        row += span.coded
    return out


def _check_finite(rows: FloatArray, name: str) -> None:
    """Raises: CorruptBlobError. No page of ours decodes to this, a forged one might."""
    peak = max(float(rows.max()), -float(rows.min())) if rows.size else 0.0
    if not peak < _TOO_LARGE:  # also true of NaN
        raise CorruptBlobError(f"stream {name!r}", "decodes to NaN or infinite values")
