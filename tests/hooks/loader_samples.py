"""Stored blobs of a small model, as a node daemon would find and answer them."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvferry.cluster.repository import BlobInfo, CodecInfo, LookupQuery, LookupResult, StateFound
from kvferry.codec.base import RING_KEYS, RING_VALUES, Codec, DType, PageTensors, Stream
from kvferry.codec.blob import BlobMeta, encode_blob
from kvferry.codec.calibration import GroupAccumulator, GroupCalibration, fit_group
from kvferry.codec.raw import RawCodec
from kvferry.codec.registry import make_codec
from kvferry.errors import CalibrationMissingError, FerryError
from kvferry.node.coding import Shard
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.loader import Loader
from kvferry.node.restore import RUN_PAGES
from kvferry.proto.keys import BlobKey, page_keys, state_key, tail_key

MODEL = b"m" * 32
GROUPS = ((0, 2), (2, 4))
PAGES = RUN_PAGES + 2
SHARD = Shard(
    model_id=MODEL, model_layers=4, model_heads=1, head_dim=8, layers=(0, 4), heads=(0, 1),
    page_tokens=16,
)  # fmt: skip
TOKENS = list(range(16 * PAGES + 3))
ROOT = SHARD.root(b"s" * 32)
KEYS = page_keys(ROOT, TOKENS, 16)

Answer = bytes | FerryError


def whole() -> PageTensors:
    rng = np.random.default_rng(5)
    shape = (4, 1, 16 * PAGES, 8)
    streams = {
        n: Stream(n, rng.standard_normal(shape, dtype=np.float32), DType.FLOAT32) for n in "kv"
    }
    return PageTensors((0, 4), (0, 1), (0, 16 * PAGES), streams)


def calibration(layers: tuple[int, int]) -> GroupCalibration:
    seen = GroupAccumulator(model_id=MODEL, layers=layers, heads=(0, 1), ropes={})
    seen.add(whole().cut_layers(layers))
    return fit_group(seen)


@dataclass
class Served:
    """Stored blobs, as a node daemon would find and answer them."""

    pages: list[list[BlobInfo]]
    answers: dict[BlobKey, Answer]
    states: list[StateFound] = field(default_factory=list)
    closed: bool = False
    asked: list[BlobKey] = field(default_factory=list)
    requests: int = 0
    before: Callable[[int], None] = lambda count: None
    order: Callable[[Sequence[BlobKey]], Sequence[BlobKey]] = lambda keys: keys

    def lookup(self, query: LookupQuery) -> LookupResult:
        return LookupResult(pages=self.pages, tails=[], states=self.states)

    def get_each(
        self, keys: Sequence[BlobKey], deadline_s: float
    ) -> Generator[tuple[BlobKey, Answer], None, None]:
        self.requests += 1
        try:
            for count, key in enumerate(self.order(keys)):
                self.before(count)
                self.asked.append(key)
                yield key, self.answers[key]
        finally:
            self.closed = True


class Known:
    """Calibrations that tell when they are asked for."""

    def __init__(self, *known: GroupCalibration) -> None:
        self._known: Mapping[bytes, GroupCalibration] = {c.id: c for c in known}
        self.warmed, self.used = threading.Event(), threading.Event()

    def get(self, calibration_id: bytes) -> GroupCalibration:
        self.used.set()
        if calibration_id not in self._known:
            raise CalibrationMissingError(calibration_id.hex())
        return self._known[calibration_id]

    def warm(self, calibration_id: bytes) -> None:
        self.warmed.set()
        if calibration_id not in self._known:
            raise CalibrationMissingError(calibration_id.hex())


def info_of(
    key: BlobKey, data: bytes, codec: Codec, previous: bytes, span: tuple[int, int]
) -> BlobInfo:
    return BlobInfo(
        key=key,
        size=len(data),
        codec=CodecInfo(
            name=codec.name, version=codec.version, calibration_id=codec.calibration_id
        ),
        model_id=MODEL,
        previous_key=previous,
        tokens=span,
        layers=key.layers,
        heads=key.heads,
        model_layers=4,
        model_heads=1,
    )


def served(codecs: Sequence[Codec]) -> Served:
    page, infos, answers = whole(), [], {}
    for index, page_key in enumerate(KEYS):
        previous = KEYS[index - 1] if index else ROOT
        span = (16 * index, 16 * index + 16)
        infos.append([])
        for layers, codec in zip(GROUPS, codecs, strict=True):
            meta = BlobMeta(
                kind="page", model_id=MODEL, page_key=page_key, previous_key=previous,
                model_layers=4, model_heads=1,
            )  # fmt: skip
            key, data = encode_blob(codec, page.cut_layers(layers).cut_tokens(span), meta)
            answers[key] = data
            infos[-1].append(info_of(key, data, codec, previous, span))
    return Served(infos, answers)


def ring(tokens: int) -> PageTensors:
    """What two state layers hold after so many tokens."""
    rng = np.random.default_rng(tokens)
    streams = {
        name: Stream(name, rng.standard_normal((2, 1, 8, 8), dtype=np.float32), DType.FLOAT32)
        for name in (RING_KEYS, RING_VALUES)
    }
    return PageTensors((0, 2), (0, 1), (tokens - tokens % 16 - 16, tokens), streams)


def add_state(client: Served, tokens: int) -> BlobKey:
    """Have it stored too."""
    page, codec = ring(tokens), make_codec("zstd", {})
    pages = page.tokens[0] // 16
    previous = KEYS[pages - 1] if pages else ROOT
    name = state_key(tail_key(previous, TOKENS[slice(*page.tokens)]))
    meta = BlobMeta(
        kind="state", model_id=MODEL, page_key=name, previous_key=previous,
        model_layers=2, model_heads=1,
    )  # fmt: skip
    key, data = encode_blob(codec, page, meta)
    client.answers[key] = data
    info = info_of(key, data, codec, previous, page.tokens)
    client.states.append(
        StateFound(key=name, pages=pages, tokens=tokens - page.tokens[0], blobs=[info])
    )
    return key


def loader(client: Served, calibrations: Known | None = None, shard: Shard = SHARD) -> Loader:
    return Loader(
        client=client,
        calibrations=calibrations or Known(),
        shard=shard,
        root=ROOT,
        accept=frozenset(),
        rope={},
    )


def load(client: Served, calibrations: Known | None = None, shard: Shard = SHARD) -> Loaded:
    return loader(client, calibrations, shard).load(TOKENS, 5.0)


def assert_prefix(loaded: Loaded, pages: int) -> None:
    assert (loaded.tokens, loaded.pages) == (16 * pages, pages)
    if not pages:
        assert loaded.tensors is None
        return
    assert loaded.tensors is not None
    expected = whole().cut_tokens((0, 16 * pages))
    for name, stream in expected.streams.items():
        np.testing.assert_array_equal(loaded.tensors.streams[name].data, stream.data)


RAW = (RawCodec(), RawCodec())
