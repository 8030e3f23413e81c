"""Encode and decode of real `ferry` pages against their matrix products alone, and the
model's own prefill.

A whole and its products are timed in turn and their ratios taken pair by pair, so that
other work on the machine slows both. Both run in one process, so in the same BLAS with
the same number of threads. Prefill and decode take turns as well.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import DType, FloatArray, PageTensors, Stream
from kvferry.codec.blob import BlobMeta, StoredBlob
from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.lab.coding import GroupSource, decode_pages, encode_page, page_meta
from kvferry.codec.lab.forward import PREFILL_CHUNK, prefill
from kvferry.codec.lab.machine import load_average, machine
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.rows import page_rows
from kvferry.codec.transform import Fold, project, reconstruct
from kvferry.errors import ConfigError
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS

RUN_PAGES = 8
RUN_TOKENS = RUN_PAGES * DEFAULT_PAGE_TOKENS
# The first page of a sequence also holds exact tokens; the second is what most are like.
_USUAL = 1
Report = Callable[[float, str], None]
Work = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """What to measure.

    Attributes:
        loaded, model_id: the model; its cache is captured while its prefill is timed.
        groups, curve: its calibration.
        options: of `ferry`.
        dtype: element type of the cache; None: the model's own.
        rounds: pairs of whole and products.
        prefills: prefills of `RUN_TOKENS`, spread over the rounds.
    """

    loaded: LoadedModel
    model_id: bytes
    groups: Sequence[GroupCalibration]
    curve: Sequence[CurvePoint]
    options: dict[str, object] = field(default_factory=lambda: {"target_kl": 0.005})
    dtype: DType | None = None
    rounds: int = 15
    prefills: int = 3

    @property
    def work(self) -> float:
        """All there is to do, in tokens of prefill."""
        return RUN_TOKENS * self.prefills + PREFILL_CHUNK + _ROUND_WORK * self.rounds

    def run(self, tokens: Sequence[int], report: Report) -> dict[str, object]:
        """Measure.

        Args:
            tokens: `RUN_TOKENS` of them.
            report: called with work done so far and what is being timed.
        Returns: the JSON object of ``kvferry bench codec``.
        Raises: ConfigError, CodecError, ModelError.
        """
        if len(tokens) != RUN_TOKENS:
            raise ConfigError("text", f"{len(tokens)} tokens", f"{RUN_TOKENS} tokens")
        busy = load_average()
        clock = _Clock(report)
        prefill(self.loaded.model, tokens[:PREFILL_CHUNK], self._cache(), clock.done("warming"))
        subject, prefills, decodes = None, [], []
        pairs: dict[str, list[tuple[float, float]]] = {"encode": [], "decode": [], "run": []}
        per_prefill = -(-self.rounds // self.prefills)
        left = self.rounds
        for _ in range(self.prefills):
            cache = self._cache()
            started = time.perf_counter()
            prefill(self.loaded.model, tokens, cache, clock.done("prefill"))
            prefills.append(RUN_TOKENS / (time.perf_counter() - started))
            if subject is None:
                subject = self._subject(cache)
            for _ in range(min(per_prefill, left)):
                left -= 1
                for name, (whole, alone) in subject.pairs.items():
                    pairs[name].append(_in_turn(whole, alone))
                decodes.append(RUN_TOKENS / pairs["run"][-1][0])
                clock.add(_ROUND_WORK, "encode and decode")
        if subject is None:
            raise ConfigError("prefills", self.prefills, "at least 1")
        return self._result(subject, pairs, prefills, decodes, busy)

    def _cache(self) -> list[Any]:
        return make_prompt_cache(self.loaded.model)

    def _subject(self, cache: list[Any]) -> "_Subject":
        shape = describe(self.loaded.model, self.loaded.config)
        snapshot = adapters.snapshot(cache, RUN_TOKENS, latent=shape.latent)
        made = _Subject(self.model_id, shape.layers, shape.kv_heads, GroupSource(self.groups))
        for group in self.groups:
            codec = FerryCodec.from_options(self.options, group, self.curve)
            spans = [
                (at, at + DEFAULT_PAGE_TOKENS) for at in range(0, RUN_TOKENS, DEFAULT_PAGE_TOKENS)
            ]
            pages = [_as_dtype(snapshot.page(group.layers, span), self.dtype) for span in spans]
            made.add(group, codec, pages)
        return made

    def _result(
        self,
        subject: "_Subject",
        pairs: dict[str, list[tuple[float, float]]],
        prefills: list[float],
        decodes: list[float],
        busy: float,
    ) -> dict[str, object]:
        rate, prompt = statistics.median(decodes), statistics.median(prefills)
        fp16 = subject.values_fp16
        timed = {name: _figures(found) for name, found in pairs.items()}
        first = next(iter(subject.codecs.values()))
        return {
            "model": self.loaded.name,
            "dtype": subject.dtype.value,
            "options": dict(self.options),
            "step": first.step,
            "rank": {f"{a}-{b}": c.params["rank"] for (a, b), c in subject.codecs.items()},
            "encode_vs_gemm": timed["encode"]["ratio"],
            "decode_vs_gemm": timed["decode"]["ratio"],
            "decode_run_vs_gemm": timed["run"]["ratio"],
            "decode_tokens_per_second": rate,
            "decode_fp16_bytes_per_second": rate * fp16 / RUN_TOKENS,
            "prefill_tokens_per_second": prompt,
            "decode_vs_prefill": rate / prompt,
            "compression_ratio": fp16 / subject.blob_bytes,
            "page_tokens": DEFAULT_PAGE_TOKENS,
            "run_pages": RUN_PAGES,
            "rounds": self.rounds,
            "timed": timed,
            "prefill_spread": [min(prefills), max(prefills)],
            "decode_spread": [min(decodes), max(decodes)],
            "load_average": [busy, load_average()],
            "machine": machine(),
        }


_ROUND_WORK = 200.0


class _Clock:
    """Work done so far, in tokens of prefill."""

    def __init__(self, report: Report) -> None:
        self._report, self._total = report, 0.0

    def add(self, work: float, note: str) -> None:
        self._total += work
        self._report(self._total, note)

    def done(self, note: str) -> Callable[[int], None]:
        return lambda count: self.add(count, note)


class _Subject:
    """Pages of all layers, their blobs, and the products that are in them."""

    def __init__(self, model_id: bytes, layers: int, heads: int, source: GroupSource) -> None:
        self._model_id, self._layers, self._heads = model_id, layers, heads
        self._source = source
        self.codecs: dict[tuple[int, int], FerryCodec] = {}
        self.dtype = DType.FLOAT32
        self.values_fp16 = self.blob_bytes = 0
        self._pages: list[tuple[FerryCodec, PageTensors]] = []
        self._one: list[StoredBlob] = []
        self._run: list[StoredBlob] = []
        self._encode: list[tuple[FloatArray, Fold, int]] = []
        self._decode: list[tuple[FloatArray, Fold]] = []

    def add(self, group: GroupCalibration, codec: FerryCodec, pages: Sequence[PageTensors]) -> None:
        """A layer group: what is timed of it."""
        self.codecs[group.layers] = codec
        usual = pages[_USUAL]
        self._pages.append((codec, usual))
        for index, page in enumerate(pages):
            blob = encode_page(codec, page, self._meta(index))
            self._run.append(blob)
            self.values_fp16 += page.raw_bytes_fp16
            self.blob_bytes += len(blob.data)
            if page is usual:
                self._one.append(blob)
        ranks: Any = codec.params["rank"]
        for name, bundle in group.bundles.items():
            names = [part.name for part in bundle.parts]
            self.dtype = usual.streams[names[0]].dtype
            rows = page_rows(usual, names, group.ropes, usual.tokens[0])
            z = project(rows, bundle.fold, ranks[name])
            self._encode.append((rows, bundle.fold, ranks[name]))
            self._decode.append((np.hstack([np.ones((len(z), 1), np.float32), z]), bundle.fold))
        for blobs in (self._one, self._run):  # decodes, or says why not
            self._decoded(blobs)

    @property
    def pairs(self) -> dict[str, tuple[Work, Work]]:
        """What is timed: a whole and its products alone."""
        tall = [(np.tile(z, (RUN_PAGES, 1)), by) for z, by in self._decode]
        return {
            "encode": (
                lambda: [encode_page(c, page, self._meta(0)) for c, page in self._pages],
                lambda: [_encode_product(*part) for part in self._encode],
            ),
            "decode": (
                lambda: self._decoded(self._one),
                lambda: [_decode_product(*part) for part in self._decode],
            ),
            "run": (
                lambda: self._decoded(self._run),
                lambda: [_decode_product(*part) for part in tall],
            ),
        }

    def _decoded(self, blobs: Sequence[StoredBlob]) -> list[PageTensors]:
        return decode_pages(blobs, self._model_id, self._source)

    def _meta(self, index: int) -> BlobMeta:
        return page_meta(self._model_id, index, self._layers, self._heads)


def _encode_product(x: FloatArray, by: Fold, rank: int) -> object:
    """Nothing but the product; on a device with what moves its operands."""
    return x @ by.forward.matrix[:, :rank] if by.products is None else project(x, by, rank)


def _decode_product(z: FloatArray, by: Fold) -> object:
    return z @ by.decode[:, : z.shape[1]].T if by.products is None else reconstruct(z, by)


def _in_turn(whole: Work, alone: Work) -> tuple[float, float]:
    """Seconds of each."""
    start = time.perf_counter()
    alone()
    middle = time.perf_counter()
    whole()
    return time.perf_counter() - middle, middle - start


def _figures(pairs: Sequence[tuple[float, float]]) -> dict[str, object]:
    """Medians; the spread of the ratio is its quartiles."""
    ratios = sorted(whole / alone for whole, alone in pairs)
    return {
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "seconds": statistics.median(whole for whole, _ in pairs),
        "gemm_seconds": statistics.median(alone for _, alone in pairs),
    }


def _as_dtype(page: PageTensors, dtype: DType | None) -> PageTensors:
    if dtype is None:
        return page
    streams = {
        name: Stream.from_float32(name, stream.float32(), dtype)
        for name, stream in page.streams.items()
    }
    return PageTensors(page.layers, page.heads, page.tokens, streams)
