"""The default codec: RoPE undone, one basis per layer group, one step, entropy coded.

Design section 6.1, with K and V in one basis. Per bundle of a page: rows of the tokens
after the sinks, projected by one matrix product, divided by the step and rounded, 64
columns at a time through pcodec. Tokens that matter more are coded with a finer step
(`kvferry.codec.importance`). Sections ``<bundle>/q`` (coefficients),
``<bundle>/steps`` (exponents of the tokens' steps; absent where all are equal) and
``<stream>/sinks`` (the first tokens of a sequence).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvferry.codec import options as opts
from kvferry.codec import sections as sec
from kvferry.codec.base import (
    CalibrationSource,
    CodedPage,
    Encoded,
    PageTensors,
    Stream,
    Wanted,
)
from kvferry.codec.calibrated import (
    Calibrated,
    Span,
    calibration_of,
    join_tokens,
    split_page,
)
from kvferry.codec.calibration import (
    BundleCalibration,
    CurvePoint,
    GroupAccumulator,
    GroupCalibration,
    fit_group,
    step_on_curve,
)
from kvferry.codec.entropy import pack_columns
from kvferry.codec.ferry_parts import ReadPlan, check_page, read_coefficients, read_plan
from kvferry.codec.importance import DEFAULT_ADAPT, exponents, factors
from kvferry.codec.quantize import quantize
from kvferry.codec.rows import page_rows
from kvferry.codec.settle import settle
from kvferry.codec.transform import project, rank_at, reconstruct
from kvferry.errors import (
    CalibrationMissingError,
    ConfigError,
)
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

MAX_ADAPT = 2.0
_TOO_LARGE = 1e38


@dataclass(frozen=True, slots=True, eq=False)
class FerryCodec(Calibrated):
    """Transform codec over one layer group.

    Attributes:
        step: quantization step in the weighted space.
        calibration: of exactly the layers and heads of the pages; None: decode only.
        adapt: how much the step follows a token's importance, 0 to 2.
    """

    name: ClassVar[str] = "ferry"
    version: ClassVar[int] = 2  # 1 coded every stream by itself

    step: float = 1.0
    calibration: GroupCalibration | None = None
    adapt: float = DEFAULT_ADAPT

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object],
        calibration: GroupCalibration | None,
        curve: Sequence[CurvePoint],
    ) -> Self:
        """``step``, or ``target_kl`` where ``curve`` is given; and ``adapt``.

        Raises: ConfigError; CalibrationMissingError.
        """
        opts.check_names(cls.name, options, ("step", "target_kl", "adapt"))
        if calibration is None:
            raise CalibrationMissingError("")
        if not calibration.bundles:
            made_by = "of ferry; `kvferry calibrate` makes one"
            raise ConfigError("calibration", calibration.id.hex()[:16], made_by)
        if ("step" in options) == ("target_kl" in options):
            raise ConfigError("ferry options", dict(options), "either step or target_kl")
        adapt = opts.number_within("adapt", options.get("adapt", DEFAULT_ADAPT), 0.0, MAX_ADAPT)
        if "step" in options:
            step = opts.positive_number("step", options["step"])
        else:
            step = step_on_curve(curve, opts.positive_number("target_kl", options["target_kl"]))
        return cls(step, calibration, adapt)

    @property
    def params(self) -> Mapping[str, object]:
        """``step``, ``adapt``, ``sinks`` (exact tokens at a sequence's start), ``rank`` per
        bundle."""
        return {
            "adapt": self.adapt,
            "rank": {name: rank_at(b.sigma, self.step) for name, b in self._known.bundles.items()},
            "sinks": SINK_TOKENS,
            "step": self.step,
        }

    def fit(self, sample: Iterable[PageTensors]) -> GroupCalibration:
        """Bases refitted on other pages of the same model and group."""
        old = self._known
        seen = GroupAccumulator.like(old)
        for page in sample:
            seen.add(page)
        weights = {n: s.weight for n, s in old.streams.items() if s.weight is not None}
        return fit_group(seen, weights=weights, source=old.source)

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for another range than the calibration's, for
        streams that it lacks, and for NaN or infinite values behind the sinks."""
        known = self._known
        span, exact = split_page(page, known)
        sections = list(exact.values())
        if span.coded:
            for _, bundle in sorted(known.bundles.items()):
                sections += self._coded(page, span.tokens[0], bundle)
        return Encoded(sections, known.rope_fingerprint)

    def _coded(self, page: PageTensors, first: int, bundle: BundleCalibration) -> list[SectionData]:
        names = [part.name for part in bundle.parts]
        with np.errstate(over="ignore", invalid="ignore"):  # `quantize` refuses those
            rows = page_rows(page, names, self._known.ropes, first)
            by = bundle.fold
            chosen = exponents(rows, bundle.predictor, self.adapt)
            steps = np.float32(self.step) * factors(chosen)
            z = project(rows, by, rank_at(bundle.sigma, self.step))
            settled = partial(settle, rows=rows, by=by.forward, steps=steps)
            q = quantize(z, steps, bundle.name, settled)
        sections = [SectionData(f"{bundle.name}/q", pack_columns(q), q.nbytes)]
        if chosen.any():
            packed = pack_columns(chosen[:, None])
            sections.append(SectionData(f"{bundle.name}/steps", packed, chosen.nbytes))
        return sections

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
        joined: dict[str, npt.NDArray[np.generic]] = {}
        with np.errstate(over="ignore", invalid="ignore"):  # `join_tokens` refuses those
            for bundle in known.bundles.values():
                joined |= _decode_bundle(bundle, pages, known, plan)
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


def _decode_bundle(
    bundle: BundleCalibration,
    pages: Sequence[CodedPage],
    known: GroupCalibration,
    plan: ReadPlan,
) -> dict[str, npt.NDArray[np.generic]]:
    spans = [Span.of(page.wanted.tokens, plan.sinks) for page in pages]
    z = np.empty((sum(s.coded for s in spans), 1 + plan.rank[bundle.name]), dtype=np.float32)
    z[:, 0] = 1.0
    at = 0
    for page, span in zip(pages, spans, strict=True):
        if span.coded:
            read_coefficients(page, bundle.name, plan, z[at : at + span.coded, 1:])
        at += span.coded
    layers = sec.layer_slice(pages[0].wanted)
    joined = {}
    for part in bundle.parts:
        rows = reconstruct(z, bundle.fold, bundle.rows_of(part.name, layers))
        joined[part.name] = join_tokens(part.name, rows, pages, known, plan.sinks)
    return joined
