"""The default codec: RoPE undone, one basis per layer group, one step, entropy coded.

Design section 6.1. Per stream of a page: rows of the tokens after the sinks, projected
by one matrix product, divided by the step and rounded, 64 columns at a time through
pcodec. Sections ``<stream>/q`` (coefficients) and ``<stream>/sinks`` (the first tokens
of a sequence, bit for bit).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvferry.codec import options as opts
from kvferry.codec import sections as sec
from kvferry.codec.base import (
    CalibrationSource,
    CodedPage,
    Encoded,
    FloatArray,
    PageTensors,
    Stream,
    Wanted,
)
from kvferry.codec.calibration import (
    CurvePoint,
    GroupAccumulator,
    GroupCalibration,
    fit_group,
    step_on_curve,
)
from kvferry.codec.entropy import pack_bits, pack_columns
from kvferry.codec.ferry_parts import (
    ReadPlan,
    calibration_of,
    check_page,
    read_coefficients,
    read_plan,
    read_sinks,
    sink_count,
)
from kvferry.codec.quantize import quantize
from kvferry.codec.rope import RopeSpec
from kvferry.codec.rows import page_rows, store_rows
from kvferry.codec.transform import project, rank_at, reconstruct
from kvferry.errors import (
    CalibrationMissingError,
    ConfigError,
    CorruptBlobError,
    UnsupportedTensorError,
)
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

_TOO_LARGE = 1e38


@dataclass(frozen=True, slots=True, eq=False)
class FerryCodec:
    """Transform codec over one layer group.

    Attributes:
        step: quantization step in the weighted space.
        calibration: of exactly the layers and heads of the pages; None: decode only.
    """

    name: ClassVar[str] = "ferry"
    version: ClassVar[int] = 1

    step: float = 1.0
    calibration: GroupCalibration | None = None

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object],
        calibration: GroupCalibration | None,
        curve: Sequence[CurvePoint],
    ) -> Self:
        """``step``, or ``target_kl`` where ``curve`` is given.

        Raises: ConfigError; CalibrationMissingError.
        """
        opts.check_names(cls.name, options, ("step", "target_kl"))
        if calibration is None:
            raise CalibrationMissingError("")
        if len(options) != 1:
            raise ConfigError("ferry options", dict(options), "either step or target_kl")
        if "step" in options:
            return cls(opts.positive_number("step", options["step"]), calibration)
        target = opts.positive_number("target_kl", options["target_kl"])
        return cls(step_on_curve(curve, target), calibration)

    @property
    def params(self) -> Mapping[str, object]:
        """``step``, ``sinks`` (exact tokens at a sequence's start), ``rank`` per stream."""
        return {
            "rank": {name: rank_at(s.sigma, self.step) for name, s in self._known.streams.items()},
            "sinks": SINK_TOKENS,
            "step": self.step,
        }

    @property
    def calibration_id(self) -> bytes:
        """Id of the calibration of just these layers and heads."""
        return self._known.id

    @property
    def _known(self) -> GroupCalibration:
        if self.calibration is None:
            raise CalibrationMissingError("")
        return self.calibration

    def fit(self, sample: Iterable[PageTensors]) -> GroupCalibration:
        """Bases refitted on other pages of the same model and group."""
        old = self._known
        seen = GroupAccumulator(
            model_id=old.model_id, layers=old.layers, heads=old.heads, ropes=old.ropes
        )
        for page in sample:
            seen.add(page)
        weights = {n: s.weight for n, s in old.streams.items() if s.weight is not None}
        return fit_group(seen, weights=weights, source=old.source)

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for another range than the calibration's, for
        streams that it lacks, and for NaN or infinite values behind the sinks."""
        known = self._known
        if (page.layers, page.heads) != (known.layers, known.heads):
            raise UnsupportedTensorError("*", f"layers {page.layers} differ from the calibration's")
        if set(page.streams) != set(known.streams):
            raise UnsupportedTensorError("*", f"streams {sorted(page.streams)} are not calibrated")
        exact = sink_count(page.tokens, SINK_TOKENS)
        sections: list[SectionData] = []
        for name, basis in sorted(known.streams.items()):
            stream = page.streams[name]
            if stream.data.shape[1::2] != (basis.heads, basis.dim):
                raise UnsupportedTensorError(name, f"shape {stream.data.shape} is not calibrated")
            if exact:
                sinks = stream.data[:, :, :exact]
                sections.append(SectionData(f"{name}/sinks", pack_bits(sinks), sinks.nbytes))
            if stream.data.shape[2] > exact:
                begin = page.tokens[0] + exact
                with np.errstate(over="ignore", invalid="ignore"):  # `quantize` refuses those
                    rows = page_rows(page, name, known.ropes.get(name), begin)
                    z = project(rows, basis.fold, rank_at(basis.sigma, self.step))
                    q = quantize(z, self.step, name)
                sections.append(SectionData(f"{name}/q", pack_columns(q), q.nbytes))
        return Encoded(sections, known.rope_fingerprint)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Raises: CorruptBlobError, CalibrationMissingError, IdentityMismatchError."""
        return self.decode_run([CodedPage(wanted, sections)], calibrations)[0]

    def decode_run(
        self, pages: Sequence[CodedPage], calibrations: CalibrationSource
    ) -> list[PageTensors]:
        """One matmul per stream for all pages; they share arrays. See `RunCodec`."""
        first = pages[0].wanted
        known = calibration_of(first, calibrations)
        plan = read_plan(first, known)
        for page in pages:
            check_page(page, known, plan)
        with np.errstate(over="ignore", invalid="ignore"):  # `_check_finite` refuses those
            joined = {name: _decode_stream(name, pages, known, plan) for name in known.streams}
        result, at = [], 0
        for page in pages:
            end = at + page.wanted.tokens[1] - page.wanted.tokens[0]
            streams = {
                name: Stream(name, data[:, :, at:end], first.dtypes[name])
                for name, data in joined.items()
            }
            result.append(PageTensors(first.cut, first.heads, page.wanted.tokens, streams))
            at = end
        return result


def _decode_stream(
    name: str, pages: Sequence[CodedPage], known: GroupCalibration, plan: ReadPlan
) -> npt.NDArray[np.generic]:
    first = pages[0].wanted
    basis, dtype, layers = known.streams[name], first.dtypes[name], sec.layer_slice(first)
    spans = [_Span.of(page.wanted, plan) for page in pages]
    z = np.empty((sum(s.coded for s in spans), 1 + plan.rank[name]), dtype=np.float32)
    z[:, 0] = 1.0
    at = 0
    for page, span in zip(pages, spans, strict=True):
        if span.coded:
            read_coefficients(page, name, plan, z[at : at + span.coded, 1:])
        at += span.coded
    width = basis.heads * basis.dim
    rows = reconstruct(z, basis.fold, slice(layers.start * width, layers.stop * width))
    _check_finite(rows, name)
    tokens = sum(s.exact + s.coded for s in spans)
    count = layers.stop - layers.start
    out = np.empty((count, basis.heads, tokens, basis.dim), dtype=dtype.storage)
    ropes: Sequence[RopeSpec] | None = known.ropes.get(name)
    ropes = None if ropes is None else ropes[layers]
    at = row = 0
    for page, span in zip(pages, spans, strict=True):
        sinks = read_sinks(page, name, plan)
        if sinks is not None:
            out[:, :, at : at + span.exact] = sinks[layers]
        at += span.exact
        if span.coded:
            part = rows[row : row + span.coded]
            store_rows(out[:, :, at : at + span.coded], dtype, part, ropes, span.tokens)
        at += span.coded
        row += span.coded
    return out


def _check_finite(rows: FloatArray, name: str) -> None:
    """Raises: CorruptBlobError. No page of ours decodes to this, a forged one might."""
    peak = max(float(rows.max()), -float(rows.min())) if rows.size else 0.0
    if not peak < _TOO_LARGE:  # also true of NaN
        raise CorruptBlobError(f"stream {name!r}", "decodes to NaN or infinite values")


@dataclass(frozen=True, slots=True)
class _Span:
    """A page's tokens: how many are exact, how many coded, and which the coded are."""

    exact: int
    coded: int
    tokens: tuple[int, int]

    @classmethod
    def of(cls, wanted: Wanted, plan: ReadPlan) -> "_Span":
        exact = sink_count(wanted.tokens, plan.sinks)
        begin, end = wanted.tokens
        return cls(exact, end - begin - exact, (begin + exact, end))
