"""Encode and decode of a `ferry` page against its matrix products alone (design 12).

One layer group as SmolLM2-135M has it: 15 layers, 3 heads of 64, 256 tokens. The basis
is random, its spectrum and rank are those of a step of 0.9 on that model. Product and
whole are timed in turn, so that a busy machine slows both; medians of the ratios.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.record import write_result
from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import BlobMeta, StoredBlob, decode_blob, decode_blobs, encode_blob
from kvferry.codec.calibration import GroupCalibration, StreamCalibration
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.rope import RopeSpec
from kvferry.codec.rows import store_rows
from kvferry.codec.transform import project, rank_at, reconstruct

LAYERS, HEADS, TOKENS, DIM, RANK, STEP, RUN = 15, 3, 256, 64, 1000, 0.9, 8
MODEL = bytes(32)
REPEATS = 25


class _One:
    def __init__(self, known: GroupCalibration) -> None:
        self._known = known

    def get(self, calibration_id: bytes) -> GroupCalibration:
        return self._known


def _calibration(rng: np.random.Generator) -> GroupCalibration:
    width = LAYERS * HEADS * DIM
    sigma = (20.0 * (1 + np.arange(RANK)) ** -0.6).clip(0.3).astype(np.float32)
    streams = {}
    for name in ("k", "v"):
        basis, _ = np.linalg.qr(rng.standard_normal((width, RANK), dtype=np.float32))
        mean = rng.standard_normal(width, dtype=np.float32)
        streams[name] = StreamCalibration(
            name=name, heads=HEADS, dim=DIM, mean=mean, basis=basis.astype("f2"), sigma=sigma
        )
    rope = RopeSpec(DIM, False, tuple(float(f) for f in 1e5 ** (-np.arange(DIM // 2) / (DIM // 2))))
    return GroupCalibration(
        model_id=MODEL,
        layers=(0, LAYERS),
        heads=(0, HEADS),
        streams=streams,
        ropes={"k": (rope,) * LAYERS},
    )


def _page(
    known: GroupCalibration, dtype: DType, start: int, rng: np.random.Generator
) -> PageTensors:
    streams = {}
    tokens = (start, start + TOKENS)
    for name, s in known.streams.items():
        z = rng.standard_normal((TOKENS, RANK), dtype=np.float32) * s.sigma
        rows = reconstruct(np.hstack([np.ones((TOKENS, 1), np.float32), z]), s.fold)
        out = np.empty((LAYERS, HEADS, TOKENS, DIM), dtype.storage)
        store_rows(out, dtype, rows, known.ropes.get(name), tokens)
        streams[name] = Stream(name, out, dtype)
    return PageTensors(known.layers, known.heads, tokens, streams)


def _against(whole: Callable[[], object], alone: Callable[[], object]) -> tuple[float, float]:
    """(median milliseconds of the whole, median ratio to the part)."""
    times, ratios = [], []
    for _ in range(REPEATS):
        a = time.perf_counter()
        alone()
        b = time.perf_counter()
        whole()
        c = time.perf_counter()
        times.append((c - b) * 1e3)
        ratios.append((c - b) / (b - a))
    return statistics.median(times), statistics.median(ratios)


def main() -> None:
    """Time all cache types and write the result."""
    rng = np.random.default_rng(0)
    known = _calibration(rng)
    source, codec = _One(known), FerryCodec(STEP, known)
    meta = BlobMeta(
        kind="page",
        model_id=MODEL,
        page_key=MODEL,
        previous_key=MODEL,
        model_layers=LAYERS,
        model_heads=HEADS,
    )
    folds = [(s.fold, rank_at(s.sigma, STEP)) for s in known.streams.values()]
    x = rng.standard_normal((TOKENS, LAYERS * HEADS * DIM), dtype=np.float32)
    figures: dict[str, object] = {"rank": folds[0][1], "width": x.shape[1]}
    for dtype in DType:
        pages = [_page(known, dtype, TOKENS * (1 + i), rng) for i in range(RUN)]
        blobs = []
        for page in pages:
            key, data = encode_blob(codec, page, meta)
            blobs.append(StoredBlob(data, key, page.tokens))
        z = [rng.standard_normal((TOKENS, 1 + r), dtype=np.float32) for _, r in folds]
        zs = [np.tile(part, (RUN, 1)) for part in z]
        one = blobs[0]
        encode = _against(
            lambda page=pages[0]: encode_blob(codec, page, meta),
            lambda: [project(x, f, r) for f, r in folds],
        )
        decode = _against(
            lambda one=one: decode_blob(
                one.data,
                key=one.key,
                model_id=MODEL,
                tokens=one.tokens,
                cut=None,
                calibrations=source,
            ),
            lambda z=z: [reconstruct(part, f) for part, (f, _) in zip(z, folds, strict=True)],
        )
        run = _against(
            lambda blobs=blobs: decode_blobs(blobs, model_id=MODEL, cut=None, calibrations=source),
            lambda zs=zs: [reconstruct(part, f) for part, (f, _) in zip(zs, folds, strict=True)],
        )
        figures[dtype.value] = {
            "encode_ms": encode[0],
            "encode_to_matmul": encode[1],
            "decode_ms": decode[0],
            "decode_to_matmul": decode[1],
            "run_of_8_ms": run[0],
            "run_of_8_to_matmul": run[1],
            "ratio_to_fp16": pages[0].raw_bytes_fp16 / len(one.data),
        }
    print(write_result("page_codec", "python -m benchmarks.page_codec", figures).read_text())


if __name__ == "__main__":
    main()
