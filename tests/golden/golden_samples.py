"""The page and the calibration behind the golden blobs, from integer arithmetic alone."""

import numpy as np

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import BlobMeta
from kvferry.codec.calibration import BundleCalibration, GroupCalibration, StreamPart
from kvferry.codec.kvtc_calibration import KvtcCalibration, StreamErrors
from kvferry.codec.lowrank_calibration import LAYER_NORM, LowRankCalibration
from kvferry.codec.lowrank_heads import HeadBasis
from kvferry.codec.rope import RopeSpec

CALIBRATED = ("ferry", "kvtc", "lowrank")
LAYERS, HEADS, TOKENS, DIM = (2, 4), (0, 1), (0, 12), 16
SAMPLES: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("raw", "raw", {}),
    ("zstd", "zstd", {}),
    ("affine8", "affine", {"bits": 8}),
    ("affine3", "affine", {"bits": 3}),
    ("bitpack6", "bitpack", {"bits": 6}),
    ("bitpack8", "bitpack", {"bits": 8, "page_size_kb": 16}),
    ("ferry", "ferry", {"step": 0.25}),
    ("kvtc", "kvtc", {"ratio": 2}),
    ("lowrank", "lowrank", {"rank": 12, "bits": 8, "target": "kv", "identity": "3"}),
)
# Codecs that keep some tokens exactly, and which of the twelve.
DROPPED: tuple[tuple[str, dict[str, object], tuple[int, ...]], ...] = (
    ("streaming", {"window": 3, "sinks": 2, "positions": "original"}, (0, 1, 9, 10, 11)),
    ("random", {"ratio": 3, "seed": 5}, (3, 6, 8, 11)),
)

# Of codecs that merge tokens: no other codec could hold what comes back.
MERGED: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("centroid", "centroid", {"similarity": 0.2, "window": 2, "init_preserve": 1, "flush": 4}),
)


def numbers(count: int, seed: int) -> np.ndarray:
    """Multiples of 1/256 in [-4, 4): exact in every dtype that caches have."""
    state = (np.arange(count, dtype=np.uint64) + np.uint64(seed * 1_000_003)) * np.uint64(
        2_654_435_761
    )
    state = (state ^ (state >> np.uint64(15))) * np.uint64(2_246_822_519)
    return ((state >> np.uint64(13)) % np.uint64(2048)).astype(np.float32) / 256 - 4


def golden_page() -> PageTensors:
    shape = (2, 1, 12, DIM)
    streams = {
        name: Stream(name, numbers(2 * 12 * DIM, seed).reshape(shape).astype("<f2"), DType.FLOAT16)
        for seed, name in enumerate(("k", "v"), 1)
    }
    return PageTensors(LAYERS, HEADS, TOKENS, streams)


def golden_errors(rank: int) -> StreamErrors:
    """What quantization might cost, in whole numbers."""
    energy = np.arange(rank, 0, -1, dtype=np.float64) ** 2
    sums = np.concatenate([[0.0], np.cumsum(energy)])
    lost = {2: 1 / 8, 4: 1 / 128, 8: 1 / 32_768}
    groups = {
        (size, bits): (sums[size:] - sums[:-size]) * lost[bits] for size in (1, 16) for bits in lost
    }
    return StreamErrors(energy, groups)


def golden_calibration(codec: str = "ferry") -> GroupCalibration:
    """For ``ferry`` K and V in one basis, weighted and with importance; for ``kvtc`` apart."""
    rope = RopeSpec(8, False, (1.0, 0.5, 0.25, 0.125))
    if codec == "lowrank":
        return golden_bases(rope)
    bundles = {}
    for seed, names in enumerate([("k",), ("v",)] if codec == "kvtc" else [("k", "v")], 3):
        width = len(names) * 2 * DIM
        rank = width - 4
        joint = len(names) > 1
        weight = np.tile(np.eye(DIM, dtype=np.float32) / 2, (2, 1, 1, 1)) if joint else None
        made = BundleCalibration(
            parts=tuple(StreamPart(name=n, heads=1, dim=DIM, weight=weight) for n in names),
            mean=numbers(width, seed) / 8,
            basis=np.eye(width, dtype=np.float16)[:, :rank],
            sigma=np.arange(rank, 0, -1, dtype=np.float32) / 8,
            importance=numbers(8, 5) / 4 if joint else None,
        )
        bundles[made.name] = made
    known = GroupCalibration(
        model_id=bytes(range(32)),
        layers=LAYERS,
        heads=HEADS,
        bundles=bundles,
        ropes={"k": (rope, rope)},
        source="golden",
        tokens=1,
    )
    if codec != "kvtc":
        return known
    return KvtcCalibration.of(known, {name: golden_errors(2 * DIM - 4) for name in bundles})


def golden_bases(rope: RopeSpec) -> LowRankCalibration:
    """A basis per head: its own values in an order of their own, some turned round."""
    order = np.arange(DIM) * 5 % DIM
    vectors = np.eye(DIM, dtype=np.float32)[:, order] * np.where(order % 3, 1, -1)
    vectors = np.tile(vectors.astype(np.float32), (2, 1, 1, 1))
    variances = np.tile(np.arange(DIM, 0, -1, dtype=np.float32), (2, 1, 1))
    bases = {
        name: HeadBasis(
            mean=numbers(2 * DIM, seed).reshape(2, 1, DIM) / 8, vectors=vectors, variances=variances
        )
        for seed, name in enumerate(("k", "v"), 3)
    }
    return LowRankCalibration(
        model_id=bytes(range(32)),
        layers=LAYERS,
        heads=HEADS,
        bases=bases,
        nulls={"v": np.ones((2, 1), dtype=np.float32)},
        norm=LAYER_NORM,
        ropes={"k": (rope, rope)},
        source="golden",
        tokens=1,
    )


def meta() -> BlobMeta:
    return BlobMeta(
        kind="page",
        model_id=bytes(range(32)),
        page_key=bytes(range(32, 64)),
        previous_key=bytes(range(64, 96)),
        model_layers=4,
        model_heads=1,
    )
