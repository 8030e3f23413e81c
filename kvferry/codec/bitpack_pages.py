"""Pages of min/max-quantized values, each decodable alone.

A head's tokens are cut into runs that fit a page; a page holds as many runs as fit, with
the range of each channel of each run in front of their levels. Runs of fewer than 32
tokens have a range for each token instead, which costs less there.

Rotated keys have a few channels many times wider than the rest, so a range for a channel
is worth more than a bit: with 6 bits on SmolLM2 the mean error of K is 8.3 % with one range
for a layer, 6.2 % for a head, 4.0 % for a token of a head and 1.8 % for a channel of 256
tokens (V: 6.1, 5.2, 2.5, 2.8 %), the last at an eighth of a bit for each value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.codec.base import FloatArray
from kvferry.codec.packing import Levels, pack_levels, packed_size, unpack_levels
from kvferry.errors import CorruptBlobError, UnsupportedTensorError

MIN_RUN = 32  # tokens, below which ranges of tokens cost less than ranges of channels
MAX_PAGES = 512  # of one stream: the section table of a blob is bounded
_GROWTH = 0.01  # of a range, by rounding its ends to float16
_TOO_LARGE = 1e38
_TINY = 1e-35  # of a range that is none: its reciprocal would leave float32

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where the values of (rows, tokens, dim) lie; shapes alone decide it.

    Attributes:
        rows: heads of all layers (or of all sequences of a batch).
        bits: 6 or 8.
        page_bytes: what a page may take. One of a single token that needs more takes
            more, and so do the pages of a stream that would have over `MAX_PAGES`, and
            those with ranges in float32 (for float16 too wide or too narrow): 4 bytes each.
    """

    rows: int
    tokens: int
    dim: int
    bits: int
    page_bytes: int

    @property
    def by_channel(self) -> bool:
        """Whether ranges are those of channels, not of tokens."""
        return min(self._run_limit, self.tokens) >= MIN_RUN

    @property
    def _run_limit(self) -> int:
        return (self.page_bytes - 4 * self.dim) * 8 // (self.dim * self.bits)

    @property
    def runs(self) -> int:
        """Runs of one row."""
        limit = self._run_limit
        if not self.by_channel:
            limit = max(1, self.page_bytes * 8 // (self.dim * self.bits + 32))
        return -(-self.tokens // limit)

    @property
    def run_tokens(self) -> int:
        """Tokens of a run; a row's last one is padded with its last token."""
        return -(-self.tokens // self.runs)

    @property
    def ranges(self) -> int:
        """Pairs of minimum and maximum that a run has."""
        return self.dim if self.by_channel else self.run_tokens

    @property
    def run_bytes(self) -> int:
        """Bytes of a run's levels."""
        return packed_size(self.run_tokens * self.dim, self.bits)

    @property
    def per_page(self) -> int:
        """Runs of a page; the last page may have fewer."""
        fit = self.page_bytes // (self.run_bytes + 4 * self.ranges)
        return max(1, fit, -(-self.rows * self.runs // MAX_PAGES))

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return -(-self.rows * self.runs // self.per_page)

    def pages_of(self, rows: Range) -> Range:
        """The pages that hold ``rows``, half-open."""
        return rows[0] * self.runs // self.per_page, -(-rows[1] * self.runs // self.per_page)

    def runs_of(self, page: int) -> int:
        """How many runs a page holds."""
        return min(self.per_page, self.rows * self.runs - page * self.per_page)

    def page_sizes(self, page: int) -> tuple[int, int]:
        """The two lengths that a page may have: with float16 and with float32 ranges."""
        count = self.runs_of(page)
        levels, ends = count * self.run_bytes, count * self.ranges
        return levels + 4 * ends, levels + 8 * ends


def check_values(values: FloatArray, name: str) -> None:
    """Raises: UnsupportedTensorError for NaN, infinities and values beyond 1e38."""
    peak = max(float(values.max()), -float(values.min()))
    if not peak < _TOO_LARGE:  # also true of NaN
        raise UnsupportedTensorError(name, "NaN, infinite or beyond 1e38: not stored")


def pack_pages(values: FloatArray, layout: PageLayout) -> list[bytes]:
    """Quantize and pack.

    Args:
        values: (rows, tokens, dim), as `check_values` wants them.
    """
    runs = _in_runs(values, layout)
    axis = 1 if layout.by_channel else 2
    low, high = runs.min(axis=axis), runs.max(axis=axis)
    low, high, half = _stored(low, high, layout.per_page)
    shape = (len(runs), 1, -1) if layout.by_channel else (len(runs), -1, 1)
    steps = np.float32(2**layout.bits - 1)
    span = (high - low).reshape(shape)
    runs = runs - low.reshape(shape)
    runs *= np.divide(steps, span, out=np.zeros_like(span), where=span > _TINY)
    np.rint(runs, out=runs)
    np.clip(runs, 0, steps, out=runs)
    packed = _pack(runs.astype(np.uint8), layout)
    pages = []
    for page in range(layout.pages):
        part = slice(page * layout.per_page, (page + 1) * layout.per_page)
        kind = "<f2" if half[part.start] else "<f4"
        ends = np.stack([low[part], high[part]], axis=1).astype(kind)
        pages.append(ends.tobytes() + packed[part].tobytes())
    return pages


def unpack_pages(
    pages: Sequence[bytes | memoryview], layout: PageLayout, rows: Range, name: str
) -> FloatArray:
    """Values of ``rows`` out of the pages that hold them: (rows, tokens, dim).

    Args:
        pages: those of ``layout.pages_of(rows)``.
        name: what to name in errors.
    Raises: CorruptBlobError: a page of another length, or ranges that are none.
    """
    first = layout.pages_of(rows)[0]
    count = sum(layout.runs_of(first + i) for i in range(len(pages)))
    ends = np.empty((count, 2, layout.ranges), dtype=np.float32)
    packed = np.empty((count, layout.run_bytes), dtype=np.uint8)
    at = 0
    for index, data in enumerate(pages, first):
        held = layout.runs_of(index)
        if len(data) not in layout.page_sizes(index):
            raise CorruptBlobError(f"{name} page {index}", f"has {len(data):,} bytes")
        cut = len(data) - held * layout.run_bytes
        kind = "<f2" if cut == held * 4 * layout.ranges else "<f4"
        ends[at : at + held] = np.frombuffer(data[:cut], dtype=kind).reshape(held, 2, -1)
        packed[at : at + held] = np.frombuffer(data[cut:], dtype=np.uint8).reshape(held, -1)
        at += held
    skipped = rows[0] * layout.runs - first * layout.per_page
    wanted = slice(skipped, skipped + (rows[1] - rows[0]) * layout.runs)
    return _values(ends[wanted], packed[wanted], layout, name).reshape(
        rows[1] - rows[0], layout.runs * layout.run_tokens, layout.dim
    )[:, : layout.tokens]


def _values(ends: FloatArray, packed: Levels, layout: PageLayout, name: str) -> FloatArray:
    low, high = ends[:, 0], ends[:, 1]
    sane = (np.abs(ends) < 2 * _TOO_LARGE).all() and (low <= high).all()  # NaN is not
    if not sane:
        raise CorruptBlobError(name, "a range is none")
    shape = (len(ends), 1, -1) if layout.by_channel else (len(ends), -1, 1)
    with np.errstate(over="ignore"):
        span = (high - low) / np.float32(2**layout.bits - 1)
    if not np.isfinite(span).all():
        raise CorruptBlobError(name, "a range leaves float32")
    values = _unpack(packed, layout).astype(np.float32)
    values *= span.reshape(shape)
    values += low.reshape(shape)
    return values


def _in_runs(values: FloatArray, layout: PageLayout) -> FloatArray:
    missing = layout.runs * layout.run_tokens - layout.tokens
    if missing:
        values = np.concatenate([values, np.repeat(values[:, -1:], missing, axis=1)], axis=1)
    return values.reshape(layout.rows * layout.runs, layout.run_tokens, layout.dim)


def _stored(
    low: FloatArray, high: FloatArray, per_page: int
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Ends as they will be read, and for each run whether its page has them in float16.

    Rounded outwards, so that nothing is clipped; a page in which that widens a range by
    more than a hundredth keeps float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        low16, high16 = low.astype(np.float16), high.astype(np.float16)
        low16 = np.where(low16 > low, np.nextafter(low16, np.float16(-np.inf)), low16)
        high16 = np.where(high16 < high, np.nextafter(high16, np.float16(np.inf)), high16)
        wide = high16.astype(np.float32) - low16.astype(np.float32)
        fits = (wide <= (1 + _GROWTH) * (high - low)).all(axis=1)
    starts = np.arange(0, len(low), per_page)
    half = np.repeat(np.logical_and.reduceat(fits, starts), per_page)[: len(low)]
    chosen = half[:, None]
    return (
        np.where(chosen, low16.astype(np.float32), low),
        np.where(chosen, high16.astype(np.float32), high),
        half,
    )


def _columns(layout: PageLayout) -> int:
    """Values of a run, rounded up to whole bytes."""
    count = layout.run_tokens * layout.dim
    return count if layout.bits == 8 else -(-count // 4) * 4


def _pack(levels: Levels, layout: PageLayout) -> Levels:
    """(runs, bytes) of (runs, tokens, dim)."""
    flat = levels.reshape(len(levels), -1)
    padding = _columns(layout) - flat.shape[1]
    if padding:
        flat = np.pad(flat, ((0, 0), (0, padding)))
    packed = np.frombuffer(pack_levels(flat, layout.bits), dtype=np.uint8)
    return packed.reshape(len(levels), -1)[:, : layout.run_bytes]


def _unpack(packed: Levels, layout: PageLayout) -> Levels:
    columns = _columns(layout)
    missing = packed_size(columns, layout.bits) - layout.run_bytes
    if missing:
        packed = np.pad(packed, ((0, 0), (0, missing)))
    flat = unpack_levels(packed.tobytes(), len(packed) * columns, layout.bits)
    kept = flat.reshape(len(packed), columns)[:, : layout.run_tokens * layout.dim]
    return kept.reshape(len(packed), layout.run_tokens, layout.dim)
