"""KVTC as published (arXiv 2511.01815): the reference that `ferry` is measured against.

K and V apart, RoPE undone on K; one mean-centred PCA over all layers and heads of the
model; coefficients in groups whose sizes and widths a dynamic program chose for a ratio
(`kvferry.codec.kvtc_plan`); all of a page's levels, shifts and scales through DEFLATE.
Where the paper leaves a choice, the better file was taken: shifts and scales as byte
planes, levels of a component side by side, 8 bits as 256 even levels rather than fp8.
Shift and scale are each token's own, as microscaling has them; the paper can also be read
as sharing them over a page, which measured about 4 % smaller on a prototype.

Sections per stream: ``<stream>/q`` (coded tokens) and ``<stream>/sinks`` (the first
tokens of a sequence, bit for bit). The plan stands in the blob's parameters, so that a
reader needs the calibration's basis and nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

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
from kvferry.codec.calibrated import (
    Calibrated,
    Span,
    calibration_of,
    check_exact,
    join_tokens,
    read_sink_count,
    split_page,
)
from kvferry.codec.calibration import CurvePoint, GroupAccumulator, GroupCalibration
from kvferry.codec.kvtc_calibration import KvtcCalibration
from kvferry.codec.kvtc_fit import KvtcFit
from kvferry.codec.kvtc_pack import ENTROPIES, pack, raw_size, unpack
from kvferry.codec.kvtc_plan import BitPlan
from kvferry.codec.kvtc_quantize import dequantize, quantize
from kvferry.codec.rows import page_rows
from kvferry.codec.transform import project, reconstruct
from kvferry.errors import (
    CalibrationMissingError,
    ConfigError,
    CorruptBlobError,
    UnsupportedTensorError,
)
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

_PARAMS = ("entropy", "plan", "sinks")


@dataclass(frozen=True, slots=True, eq=False)
class KvtcCodec(Calibrated):
    """The published transform codec, over all layers and heads of a model.

    Attributes:
        plans: stream -> groups and widths.
        entropy: "zlib" (DEFLATE, as published) or "zstd".
        calibration: of exactly the layers and heads of the pages; None: decode only.
    """

    name: ClassVar[str] = "kvtc"
    version: ClassVar[int] = 1

    plans: Mapping[str, BitPlan] = field(default_factory=dict)
    entropy: str = "zlib"
    calibration: GroupCalibration | None = None

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object],
        calibration: GroupCalibration | None,
        curve: Sequence[CurvePoint],
    ) -> Self:
        """``ratio`` to fp16 before DEFLATE, and ``entropy``.

        Raises: ConfigError; CalibrationMissingError.
        """
        opts.check_names(cls.name, options, ("ratio", "entropy"))
        entropy = options.get("entropy", "zlib")
        if entropy not in ENTROPIES:
            raise ConfigError("entropy", entropy, " or ".join(ENTROPIES))
        ratio = opts.positive_number("ratio", options.get("ratio"))
        if ratio < 1:
            raise ConfigError("ratio", ratio, "at least 1")
        if calibration is None:
            raise CalibrationMissingError("")
        if not isinstance(calibration, KvtcCalibration):
            made_by = "of kvtc; `kvferry calibrate --codec kvtc` makes one"
            raise ConfigError("calibration", calibration.id.hex()[:16], made_by)
        return cls(calibration.plans_for(ratio), str(entropy), calibration)

    @property
    def params(self) -> Mapping[str, object]:
        """``entropy``, ``plan`` (see `BitPlan.to_json`) per stream, ``sinks`` (exact tokens)."""
        return {
            "entropy": self.entropy,
            "plan": {name: plan.to_json() for name, plan in self.plans.items()},
            "sinks": SINK_TOKENS,
        }

    def fit(self, sample: Iterable[PageTensors]) -> KvtcCalibration:
        """Basis and errors anew, from other pages of the same model."""
        old = self._known
        seen = KvtcFit(GroupAccumulator.like(old))
        for page in sample:
            seen.add(page)
        return seen.finish(old.source)

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for another range than the calibration's, for
        streams that it lacks, and for values behind the sinks that are no numbers or
        whose coefficients leave float16."""
        known = self._known
        span, exact = split_page(page, known)
        if set(page.streams) != set(self.plans):
            raise UnsupportedTensorError("*", f"streams {sorted(page.streams)} are not calibrated")
        sections: list[SectionData] = []
        for name in known.streams:
            basis = known.bundles[name]
            if span.exact:
                sections.append(exact[name])
            if span.coded:
                plan = self.plans[name]
                with np.errstate(over="ignore", invalid="ignore"):  # `quantize` refuses those
                    rows = page_rows(page, [name], known.ropes, span.tokens[0])
                    q = quantize(project(rows, basis.fold, plan.rank), plan, name)
                size = raw_size(plan, len(rows))
                sections.append(SectionData(f"{name}/q", pack(q, self.entropy), size))
        return Encoded(sections, known.rope_fingerprint)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Raises: CorruptBlobError, CalibrationMissingError, IdentityMismatchError."""
        known = calibration_of(wanted, calibrations)
        reading = _reading(wanted, sections, known)
        streams, layers = {}, sec.layer_slice(wanted)
        for name in known.streams:
            rows = np.empty((0, 0), dtype=np.float32)
            if reading.coded:
                rows = _decode_rows(sections[f"{name}/q"], reading, name, known, layers)
            data = join_tokens(name, rows, [CodedPage(wanted, sections)], known, reading.sinks)
            streams[name] = Stream(name, data, wanted.dtypes[name])
        return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams)


@dataclass(frozen=True, slots=True)
class _Reading:
    """The checked parameters of a blob, and how many of its tokens are coded."""

    plans: Mapping[str, BitPlan]
    entropy: str
    sinks: int
    coded: int


def _reading(
    wanted: Wanted, sections: Mapping[str, SectionData], known: GroupCalibration
) -> _Reading:
    sec.check_params(wanted, _PARAMS)
    entropy, plans = wanted.params["entropy"], _plans(wanted.params["plan"], known)
    if not isinstance(entropy, str) or entropy not in ENTROPIES:
        raise CorruptBlobError("codec parameters", "'entropy' is unknown")
    sinks = read_sink_count(wanted)
    span = Span.of(wanted.tokens, sinks)
    parts = ["sinks"] * bool(span.exact) + ["q"] * bool(span.coded)
    sec.check_names(sections, (f"{name}/{part}" for name in known.streams for part in parts))
    check_exact(wanted, sections, span.exact)
    if span.coded:
        for name in known.streams:
            sec.check_raw(sections[f"{name}/q"], raw_size(plans[name], span.coded))
    return _Reading(plans, entropy, sinks, span.coded)


def _plans(value: object, known: GroupCalibration) -> Mapping[str, BitPlan]:
    # Streams that are coded together have a basis of another codec.
    if not isinstance(value, dict) or set(value) != set(known.bundles):
        raise CorruptBlobError("codec parameters", "'plan' is not one per basis")
    try:
        plans = {name: BitPlan.from_json(plan) for name, plan in value.items()}
    except ConfigError as exc:
        raise CorruptBlobError("codec parameters", f"'plan': {exc}") from exc
    for name, plan in plans.items():
        if plan.rank > known.bundles[name].rank:
            raise CorruptBlobError("codec parameters", f"'plan' of {name!r} leaves the basis")
    return plans


def _decode_rows(
    section: SectionData, reading: _Reading, name: str, known: GroupCalibration, layers: slice
) -> FloatArray:
    plan, basis = reading.plans[name], known.bundles[name]
    q = unpack(section.data, plan, reading.coded, reading.entropy, f"section {section.name!r}")
    z = np.empty((reading.coded, 1 + plan.rank), dtype=np.float32)
    z[:, 0] = 1.0
    with np.errstate(over="ignore", invalid="ignore"):  # `join_tokens` refuses those
        dequantize(q, plan, z[:, 1:])
        return reconstruct(z, basis.fold, basis.rows_of(name, layers))
