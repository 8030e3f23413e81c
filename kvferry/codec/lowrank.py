"""Low rank per head: PCA coefficients of V in 16 or 8 bits, K exact.

Seed of the method: "KV Plugin Integration Guide" (per-head PCA of V only, presets), after
the observation that heads' values span fewer directions than they have. Per stream of a
page that is coded: RoPE undone (K), projected onto the strongest ``rank`` directions of
its own head, float16, or int8 with one scale per head and direction of the page. What is
not coded is exact: other streams, layers of ``identity``, the first tokens of a sequence;
float32 caches of 16-bit weights as float16, as `kvferry.codec.sinks` says, so that a
ratio is one to fp16.

Sections: ``<stream>/exact`` (all tokens of the exact layers), ``<stream>/sinks`` (first
tokens of the coded layers), ``<stream>/q`` (coefficients, (layers, heads, rank, tokens)),
``<stream>/scales`` (int8 only). The arithmetic is in `kvferry.codec.lowrank_heads`.

``ln_nullspace`` drops the direction that a LayerNorm before attention leaves empty. Let
y = g * x + b with x free of its mean, and V = W y + c of one head. For a vector u,
u . (V - Wb - c) = (diag(g) W^T u) . x is 0 for every x with sum 0 exactly where
diag(g) W^T u is a multiple of the all-ones vector: where ones lie in the row space of
W diag(g). That takes a head as wide as the model, or weights made so; a head narrower
than the model generally has no such direction, although all heads of a layer together
have one. An RMSNorm does not take the mean away, so that there is none at all. Weights
are checked head by head when a model is calibrated (`kvferry.codec.lowrank_null`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import (
    CalibrationSource,
    Encoded,
    PageTensors,
    Stream,
    Wanted,
)
from kvferry.codec.calibrated import Calibrated, Span
from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.entropy import pack_bits
from kvferry.codec.lowrank_calibration import RMS_NORM, LowRankCalibration
from kvferry.codec.lowrank_fit import HeadAccumulator
from kvferry.codec.lowrank_heads import project, quantize
from kvferry.codec.lowrank_options import TARGETS, LowRankOptions
from kvferry.codec.lowrank_read import Layers, decode_page
from kvferry.codec.rows import page_values
from kvferry.codec.sinks import pack_sinks
from kvferry.errors import CalibrationMissingError, ConfigError, UnsupportedTensorError
from kvferry.proto.container import SectionData
from kvferry.proto.keys import SINK_TOKENS

_HALF_MAX = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True, eq=False)
class LowRankCodec(Calibrated):
    """Per-head PCA of the streams of ``target``; all else exact.

    Attributes:
        rank: stream that is coded -> directions kept.
        bits: of a coefficient, 16 or 8.
        identity: layers that stay exact, absolute, of those of the calibration.
        calibration: of exactly the layers and heads of the pages; None: decode only.
    """

    name: ClassVar[str] = "lowrank"
    version: ClassVar[int] = 1

    rank: Mapping[str, int] = field(default_factory=dict)
    bits: int = 16
    identity: tuple[int, ...] = ()
    calibration: LowRankCalibration | None = None

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object],
        calibration: GroupCalibration | None,
        curve: Sequence[CurvePoint],
    ) -> Self:
        """See `LowRankOptions`; ``policy`` names settings, other options change them.

        Raises: ConfigError; CalibrationMissingError.
        """
        asked = LowRankOptions.parse(options)
        if calibration is None:
            raise CalibrationMissingError("")
        if not isinstance(calibration, LowRankCalibration):
            made_by = "of lowrank; `kvferry calibrate --codec lowrank` makes one"
            raise ConfigError("calibration", calibration.id.hex()[:16], made_by)
        exact = asked.exact_layers(calibration.layers)
        rank = {name: _rank(asked, name, calibration, exact) for name in TARGETS[asked.target]}
        return cls(rank, asked.bits, exact, calibration)

    @property
    def params(self) -> Mapping[str, object]:
        """``bits``, ``identity`` (exact layers), ``rank`` per coded stream, ``sinks``."""
        return {
            "bits": self.bits,
            "identity": list(self.identity),
            "rank": dict(sorted(self.rank.items())),
            "sinks": SINK_TOKENS,
        }

    def fit(self, sample: Iterable[PageTensors]) -> LowRankCalibration:
        """Bases anew, from other pages of the same model."""
        known = self._bases
        seen = HeadAccumulator.like(known)
        for page in sample:
            seen.add(page)
        return seen.finish(known.source, norm=known.norm)

    @property
    def _bases(self) -> LowRankCalibration:
        if self.calibration is None:
            raise CalibrationMissingError("")
        return self.calibration

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError for another range than the calibration's, for
        streams that it lacks, and for values behind the sinks that are no numbers or
        whose coefficients leave float16."""
        known = self._bases
        if (page.layers, page.heads) != (known.layers, known.heads):
            raise UnsupportedTensorError("*", f"layers {page.layers} differ from the calibration's")
        if set(page.streams) != set(known.streams):
            raise UnsupportedTensorError("*", f"streams {sorted(page.streams)} are not calibrated")
        exact = np.isin(np.arange(*page.layers), self.identity)
        sections: list[SectionData] = []
        for name, part in known.streams.items():
            stream = page.streams[name]
            if stream.data.shape[1::2] != (part.heads, part.dim):
                raise UnsupportedTensorError(name, f"shape {stream.data.shape} is not calibrated")
            coded = ~exact if name in self.rank else np.zeros_like(exact)
            if not coded.all():
                whole = Stream(name, stream.data[~coded], stream.dtype)
                sections.append(pack_sinks(f"{name}/exact", whole, stream.data.shape[2]))
            if coded.any():
                sections += self._coded(page, name, coded)
        return Encoded(sections, known.rope_fingerprint)

    def _coded(self, page: PageTensors, name: str, layers: Layers) -> list[SectionData]:
        known, stream = self._bases, page.streams[name]
        span = Span.of(page.tokens, SINK_TOKENS)
        sections = []
        if span.exact:
            first = Stream(name, stream.data[layers], stream.dtype)
            sections.append(pack_sinks(f"{name}/sinks", first, span.exact))
        if not span.coded:
            return sections
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            values = page_values(page, name, known.ropes.get(name), span.tokens[0])
            basis = known.bases[name].keep(self.rank[name])
            found = project(values, basis)[layers]
        peak = np.abs(found).max(initial=0.0)
        if not peak <= _HALF_MAX:  # also true of NaN
            raise UnsupportedTensorError(name, "NaN, infinite or beyond float16: not stored")
        # Directions side by side: values of one are alike, and so are their high bytes.
        if self.bits == 8:
            levels, scales = quantize(found)
            packed = np.ascontiguousarray(levels.swapaxes(-1, -2))
            sections.append(_section(f"{name}/scales", scales.astype("<f4")))
        else:
            packed = np.ascontiguousarray(found.astype("<f2").swapaxes(-1, -2))
        sections.append(_section(f"{name}/q", packed))
        return sections

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """Raises: CorruptBlobError, CalibrationMissingError, IdentityMismatchError."""
        return decode_page(wanted, sections, calibrations)


def _section(name: str, data: npt.NDArray[np.generic]) -> SectionData:
    return SectionData(name, pack_bits(data), data.nbytes)


def _rank(asked: LowRankOptions, name: str, known: LowRankCalibration, exact: Sequence[int]) -> int:
    """Directions of a stream, less the empty one where it is dropped. Raises: ConfigError."""
    dim = known.bases[name].dim
    rank = asked.rank_of(dim)
    if asked.ln_nullspace is False:
        return rank
    coded = [n - known.layers[0] for n in range(*known.layers) if n not in exact]
    empty = name in known.nulls and bool(known.nulls[name][coded].all())
    if empty:
        return min(rank, dim - 1)
    if asked.ln_nullspace is None:
        return rank
    raise ConfigError("ln_nullspace", "true", f"left out: {_no_null(name, known)}")


def _no_null(name: str, known: LowRankCalibration) -> str:
    if known.norm == RMS_NORM:
        return (
            "this model's norm before attention is an RMSNorm, which does not take the mean "
            "away, so that no direction of its heads is empty"
        )
    heads = known.nulls[name] if name in known.nulls else np.zeros(1)
    return (
        f"{int(heads.sum())} of this model's heads have a direction of {name.upper()} that its "
        f"norm before attention ({known.norm}) leaves empty, and all must have one"
    )
