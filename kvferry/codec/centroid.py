"""MP-KVM: tokens whose keys are alike become one entry that weighs as much as they did."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvferry.codec import dropping as drop
from kvferry.codec import options as opts
from kvferry.codec import sections as sec
from kvferry.codec.base import (
    CalibrationSource,
    Encoded,
    FloatArray,
    PageTensors,
    Stream,
    Wanted,
    clip_to,
)
from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.centroid_cluster import merge, similarity_for
from kvferry.codec.centroid_entries import Grouped
from kvferry.codec.centroid_plain import Labels, Merging
from kvferry.codec.kept import Kept
from kvferry.codec.kept_sections import POSITIONS, WEIGHTS, pack_kept, read_kept
from kvferry.codec.rope import RopeSpec, apply, combined_fingerprint, undo
from kvferry.codec.sinks import check_sinks, pack_sinks, read_sinks, sink_count
from kvferry.codec.uncalibrated import Uncalibrated
from kvferry.errors import UnsupportedTensorError
from kvferry.proto.container import SectionData

DEFAULT_RATIO = 4.0
MAX_TOKENS = 1 << 24
MAX_FLUSH = 1024  # tokens of a batch are compared with each other
_WHOLE: Mapping[str, tuple[int, int]] = {  # option -> from, to
    "window": (0, MAX_TOKENS),
    "init_preserve": (0, MAX_TOKENS),
    "flush": (1, MAX_FLUSH),
    "persistence": (0, MAX_TOKENS),
    "min_merge": (1, MAX_TOKENS),
}
_STREAMS = {"k", "v"}
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class CentroidCodec(Uncalibrated):
    """Merge tokens of each head by the likeness of their un-rotated keys.

    An entry has the mean key, rotated to the mean position of its tokens, the mean value,
    and their number, which attention adds to its score as a logarithm. Tokens that nothing
    was merged with are exact (float32 as float16 where it fits, as sinks are). Sections
    ``<stream>/kept``, ``kept/positions`` and ``kept/weights``.

    Attributes:
        how: see `Merging`.
        ratio: tokens for each entry, first and recent ones included: the similarity is
            chosen for each head so that it comes to so many. The window is at most half
            of them. None: ``how.similarity`` decides.
        ropes: of each layer of the pages; empty: decode only.
    """

    name: ClassVar[str] = "centroid"
    version: ClassVar[int] = 1
    whole_context: ClassVar[bool] = True

    how: Merging = field(default_factory=Merging)
    ratio: float | None = DEFAULT_RATIO
    ropes: tuple[RopeSpec, ...] = ()

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object],
        calibration: GroupCalibration | None,
        curve: Sequence[CurvePoint],
    ) -> Self:
        """See `parse`; of ``calibration`` only how keys are rotated. Raises: ConfigError."""
        made = cls.parse(options)
        return made if calibration is None else made.with_ropes(calibration.ropes.get("k", ()))

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> Self:
        """``ratio`` or ``similarity``, and the others of `Merging`. Raises: ConfigError."""
        opts.check_names(cls.name, options, ("ratio", "similarity", *_WHOLE))
        drop.only_one(options, ("ratio", "similarity"))
        given = {
            name: opts.whole_within(name, options[name], *span)
            for name, span in _WHOLE.items()
            if name in options
        }
        if "similarity" in options:
            similarity = opts.number_within("similarity", options["similarity"], -1, 1)
            return cls(Merging(similarity=similarity, **given), None)
        return cls(Merging(**given), drop.ratio_option(options.get("ratio", DEFAULT_RATIO)))

    def with_ropes(self, ropes: Sequence[RopeSpec]) -> Self:
        """For pages of layers that rotate their keys so."""
        return dataclasses.replace(self, ropes=tuple(ropes))

    @property
    def params(self) -> Mapping[str, object]:
        """``ratio`` or ``similarity``, and the others of `Merging`."""
        own = {name: getattr(self.how, name) for name in _WHOLE}
        if self.ratio is None:
            return own | {"similarity": self.how.similarity}
        return own | {"ratio": self.ratio}

    def encode(self, page: PageTensors) -> Encoded:
        """Raises: UnsupportedTensorError: other streams than keys and values, a page that
        lacks tokens, numbers that are none, or nobody told how keys are rotated."""
        found = self.entries(page, self.labels(page))
        assert found.kept is not None  # noqa: S101
        sections = pack_kept(found.kept, page.tokens)
        for name, stream in sorted(found.streams.items()):
            sections.append(pack_sinks(f"{name}/kept", stream, found.entries))
        return Encoded(sections, combined_fingerprint(self.ropes), found.entries)

    def labels(self, page: PageTensors) -> Labels:
        """Which entry each token goes into, (layers x heads, tokens); raises as `encode`."""
        self._check(page)
        plain = self.unrotated(page)
        how = self.merging(page)
        if self.ratio is None:
            return merge(plain, how)
        wanted = max(1, round(page.entries / self.ratio))
        if wanted >= page.entries:
            return np.broadcast_to(np.arange(page.entries), plain.shape[:2]).copy()
        return merge(plain, how, similarity_for(plain, how, wanted))

    def merging(self, page: PageTensors) -> Merging:
        """How a page is merged: its own first tokens, and a window that leaves room."""
        first = sink_count(page.tokens, self.how.init_preserve)
        if self.ratio is None:
            return dataclasses.replace(self.how, init_preserve=first)
        wanted = max(1, round(page.entries / self.ratio))
        first = min(first, wanted - 1)
        window = min(self.how.window, (wanted - first) // 2)
        return dataclasses.replace(self.how, init_preserve=first, window=window)

    def entries(self, page: PageTensors, labels: Labels) -> PageTensors:
        """A page with `PageTensors.kept`: what ``labels`` make of its tokens.

        Args:
            labels: (layers x heads, tokens), from `labels` or a control.
        """
        grouped = Grouped.of(labels)
        shape = (*page.streams["k"].data.shape[:2], grouped.width)
        positions = grouped.positions(page.tokens[0]).reshape(shape)
        means = grouped.mean(self.unrotated(page)).reshape(*shape, -1)
        merged = {
            "k": np.stack([apply(*a) for a in zip(means, self.ropes, positions, strict=True)]),
            "v": grouped.mean(_rows(page.streams["v"].float32())).reshape(*shape, -1),
        }
        rows, columns, tokens = grouped.alone()
        streams = {}
        for name, values in merged.items():
            old = page.streams[name]
            streams[name] = Stream.from_float32(name, clip_to(values, old.dtype), old.dtype)
            _rows(streams[name].data)[rows, columns] = _rows(old.data)[rows, tokens]
        kept = Kept(positions, grouped.weights().reshape(shape))
        return PageTensors(page.layers, page.heads, page.tokens, streams, kept)

    def decode(
        self,
        wanted: Wanted,
        sections: Mapping[str, SectionData],
        calibrations: CalibrationSource,
    ) -> PageTensors:
        """A page with `PageTensors.kept`, entries per head. Raises: CorruptBlobError."""
        drop.check_params(wanted, _WHOLE, ("ratio", "similarity"))
        sec.check_names(sections, [POSITIONS, WEIGHTS, *(f"{n}/kept" for n in wanted.shapes)])
        kept = read_kept(wanted, sections)
        streams, layers = {}, sec.layer_slice(wanted)
        for name, shape in wanted.shapes.items():
            section, dtype = sections[f"{name}/kept"], wanted.dtypes[name]
            check_sinks(section, int(np.prod(shape, dtype=np.int64)), dtype)
            streams[name] = Stream(name, read_sinks(section, shape, dtype)[layers], dtype)
        return PageTensors(wanted.cut, wanted.heads, wanted.tokens, streams, kept)

    def _check(self, page: PageTensors) -> None:
        if page.kept is not None:
            raise UnsupportedTensorError("*", "a page that lacks tokens is not merged again")
        if set(page.streams) != _STREAMS:
            raise UnsupportedTensorError("*", f"streams {sorted(page.streams)} are not k and v")
        if len({s.data.shape[:3] for s in page.streams.values()}) > 1:
            raise UnsupportedTensorError("*", "keys and values differ in heads")
        if len(self.ropes) != page.layers[1] - page.layers[0]:
            raise UnsupportedTensorError("k", "centroid was not told how its keys are rotated")
        for name, stream in page.streams.items():
            if not np.isfinite(stream.float32()).all():
                raise UnsupportedTensorError(name, "NaN or infinite: not merged")

    def unrotated(self, page: PageTensors) -> FloatArray:
        """Keys of a page as (layers x heads, tokens, dim), RoPE undone."""
        keys, at = page.streams["k"].float32(), np.arange(*page.tokens)
        plain = [undo(layer, spec, at) for layer, spec in zip(keys, self.ropes, strict=True)]
        return np.concatenate(plain)


def _rows(data: npt.NDArray[T]) -> npt.NDArray[T]:
    """(layers, heads, entries, dim) as (layers x heads, entries, dim); a view if it can be."""
    return data.reshape(-1, *data.shape[2:])
