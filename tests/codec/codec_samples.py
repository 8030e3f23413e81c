"""Synthetic pages and calibrations that the codec's tests share."""

from collections.abc import Mapping

import numpy as np

from kvferry.codec.base import Codec, DType, FloatArray, PageTensors, Stream
from kvferry.codec.blob import BlobMeta, decode_blob, encode_blob
from kvferry.codec.calibration import BundleCalibration, GroupCalibration, StreamPart
from kvferry.codec.rope import RopeSpec
from kvferry.codec.rows import store_rows
from kvferry.proto.keys import BlobKey

MODEL_ID = bytes(range(32))
PAGE_KEY = bytes([7]) * 32
ROOT = bytes([9]) * 32


def rope_spec(dim: int, *, dims: int | None = None, traditional: bool = False) -> RopeSpec:
    dims = dim if dims is None else dims
    freq = tuple(float(v) for v in 10_000.0 ** (-np.arange(dims // 2) / max(dims // 2, 1)))
    return RopeSpec(dims, traditional, freq)


def random_page(
    *,
    layers: tuple[int, int] = (0, 2),
    heads: tuple[int, int] = (0, 2),
    tokens: tuple[int, int] = (0, 40),
    dim: int = 32,
    dtype: DType = DType.FLOAT32,
    seed: int = 0,
    scale: float = 1.0,
) -> PageTensors:
    """Gaussian keys and values."""
    rng = np.random.default_rng(seed)
    shape = (layers[1] - layers[0], heads[1] - heads[0], tokens[1] - tokens[0], dim)
    streams = {}
    for name in ("k", "v"):
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        streams[name] = Stream.from_float32(name, values, dtype)
    return PageTensors(layers, heads, tokens, streams)


def random_calibration(
    *,
    layers: tuple[int, int] = (0, 2),
    heads: tuple[int, int] = (0, 2),
    dim: int = 32,
    rank: int = 24,
    seed: int = 1,
    weighted: bool = False,
    rope: RopeSpec | None = None,
    joint: bool = True,
    importance: bool = False,
) -> GroupCalibration:
    """Random orthonormal bases with a falling spectrum from 8 to 0.5.

    ``joint``: K and V in one basis; ``importance``: tokens differ in their steps.
    """
    rng = np.random.default_rng(seed)
    count, wide = layers[1] - layers[0], heads[1] - heads[0]
    bundles = {}
    for names in [("k", "v")] if joint else [("k",), ("v",)]:
        width = len(names) * count * wide * dim
        kept = min(rank, width)
        basis, _ = np.linalg.qr(rng.standard_normal((width, kept)))
        parts = []
        for name in names:
            weight = None
            if weighted:
                noise = rng.standard_normal((count, wide, dim, dim)) * (0.3 / np.sqrt(dim))
                weight = (np.eye(dim) + noise).astype(np.float32)
            parts.append(StreamPart(name=name, heads=wide, dim=dim, weight=weight))
        made = BundleCalibration(
            parts=tuple(parts),
            mean=rng.standard_normal(width).astype(np.float32),
            basis=basis.astype(np.float16),
            sigma=np.geomspace(8.0, 0.5, kept).astype(np.float32),
            importance=np.linspace(-0.4, 0.4, kept, dtype=np.float32) if importance else None,
        )
        bundles[made.name] = made
    spec = rope_spec(dim) if rope is None else rope
    return GroupCalibration(
        model_id=MODEL_ID,
        layers=layers,
        heads=heads,
        bundles=bundles,
        ropes={"k": (spec,) * count},
        source="random",
        tokens=1,
    )


def page_of(
    calibration: GroupCalibration,
    tokens: tuple[int, int] = (0, 40),
    dtype: DType = DType.FLOAT32,
    seed: int = 2,
) -> PageTensors:
    """A page that lies in the calibration's space: what such a model would produce."""
    rng = np.random.default_rng(seed)
    count = tokens[1] - tokens[0]
    streams = {}
    for bundle in calibration.bundles.values():
        z = rng.standard_normal((count, bundle.rank), dtype=np.float32) * bundle.sigma
        ones = np.ones((count, 1), dtype=np.float32)
        rows = np.hstack([ones, z]) @ bundle.fold.decode.T
        for part in bundle.parts:
            out = np.empty((bundle.layers, part.heads, count, part.dim), dtype=dtype.storage)
            own = np.ascontiguousarray(rows[:, bundle.rows[part.name]])
            store_rows(out, dtype, own, calibration.ropes.get(part.name), tokens)
            streams[part.name] = Stream(part.name, out, dtype)
    return PageTensors(calibration.layers, calibration.heads, tokens, streams)


def meta_for(
    kind: str = "page", *, model_layers: int = 64, model_heads: int = 64, page_key: bytes = PAGE_KEY
) -> BlobMeta:
    return BlobMeta(
        kind=kind,
        model_id=MODEL_ID,
        page_key=page_key,
        previous_key=ROOT,
        model_layers=model_layers,
        model_heads=model_heads,
    )


class Calibrations:
    """A source that holds what it was given."""

    def __init__(self, *known: GroupCalibration) -> None:
        self._known: Mapping[bytes, GroupCalibration] = {c.id: c for c in known}

    def get(self, calibration_id: bytes) -> GroupCalibration:
        from kvferry.errors import CalibrationMissingError

        if calibration_id not in self._known:
            raise CalibrationMissingError(calibration_id.hex())
        return self._known[calibration_id]


def decoded(
    data: bytes,
    key: BlobKey,
    tokens: tuple[int, int],
    *known: GroupCalibration,
    cut: tuple[int, int] | None = None,
) -> PageTensors:
    """What a reader gets that has nothing but the blob and ``known``."""
    return decode_blob(
        data, key=key, model_id=MODEL_ID, tokens=tokens, cut=cut, calibrations=Calibrations(*known)
    )


def restored(codec: Codec, page: PageTensors, meta: BlobMeta | None = None) -> PageTensors:
    """Encode, frame, check, decode."""
    known = getattr(codec, "calibration", None)
    key, data = encode_blob(codec, page, meta or meta_for())
    return decoded(data, key, page.tokens, *([] if known is None else [known]))


def bits(page: PageTensors) -> dict[str, bytes]:
    """Every stream's exact content."""
    return {name: np.ascontiguousarray(s.data).tobytes() for name, s in page.streams.items()}


def worst_error(a: PageTensors, b: PageTensors) -> float:
    return max(
        float(np.abs(a.streams[n].float32() - b.streams[n].float32()).max()) for n in a.streams
    )


def heavy_rows(
    rng: np.random.Generator, tokens: int, width: int, rank: int
) -> tuple[FloatArray, FloatArray]:
    """Correlated rows with a falling spectrum, and the mixing matrix behind them."""
    mixing = rng.standard_normal((width, rank)) * np.geomspace(3.0, 0.05, rank)
    rows = rng.standard_normal((tokens, rank)) @ mixing.T
    return rows.astype(np.float32), mixing.astype(np.float32)
