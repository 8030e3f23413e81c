"""A restore whose blobs come in any order, late, damaged or not at all."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.cluster.repository import BlobInfo, CodecInfo, LookupQuery, LookupResult
from kvferry.codec.base import Codec, DType, PageTensors, Stream
from kvferry.codec.blob import BlobMeta, encode_blob
from kvferry.codec.calibration import GroupAccumulator, GroupCalibration, fit_group
from kvferry.codec.ferry import FerryCodec
from kvferry.codec.raw import RawCodec
from kvferry.errors import BlobNotFoundError, CalibrationMissingError, FerryError
from kvferry.node.coding import Shard
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.loader import Loader
from kvferry.node.restore import RUN_PAGES
from kvferry.proto.keys import BlobKey, page_keys

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
    closed: bool = False
    asked: list[BlobKey] = field(default_factory=list)
    before: Callable[[int], None] = lambda count: None
    order: Callable[[Sequence[BlobKey]], Sequence[BlobKey]] = lambda keys: keys

    def lookup(self, query: LookupQuery) -> LookupResult:
        return LookupResult(pages=self.pages, tails=[])

    def get_each(
        self, keys: Sequence[BlobKey], deadline_s: float
    ) -> Generator[tuple[BlobKey, Answer], None, None]:
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
            infos[-1].append(
                BlobInfo(
                    key=key,
                    size=len(data),
                    codec=CodecInfo(
                        name=codec.name, version=codec.version, calibration_id=codec.calibration_id
                    ),
                    model_id=MODEL,
                    previous_key=previous,
                    tokens=span,
                    layers=layers,
                    heads=(0, 1),
                    model_layers=4,
                    model_heads=1,
                )
            )
    return Served(infos, answers)


def load(client: Served, calibrations: Known | None = None) -> Loaded:
    loader = Loader(
        client=client,
        calibrations=calibrations or Known(),
        shard=SHARD,
        root=ROOT,
        accept=frozenset(),
        rope={},
    )
    return loader.load(TOKENS, 5.0)


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


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(2 * PAGES)),
    st.dictionaries(
        st.integers(0, 2 * PAGES - 1), st.sampled_from(["missing", "damaged"]), max_size=3
    ),
)
def test_whatever_fails_the_longest_verified_prefix_is_had(
    order: list[int], failures: dict[int, str]
) -> None:
    client = served(RAW)
    keys = [info.key for page in client.pages for info in page]
    for index, how in failures.items():
        data = client.answers[keys[index]]
        assert isinstance(data, bytes)
        client.answers[keys[index]] = (
            BlobNotFoundError(str(keys[index]))
            if how == "missing"
            else data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
        )
    client.order = lambda asked: [keys[index] for index in order]
    loaded = load(client)
    assert_prefix(loaded, min(failures, default=2 * PAGES) // 2)
    assert bool(loaded.reason) == bool(failures)
    if len(failures) == 1:
        reason = {"missing": "not_found", "damaged": "corrupt"}[next(iter(failures.values()))]
        assert [loaded.reason] == loaded.problems
        assert loaded.reason == reason
    assert client.closed


def test_a_run_is_decoded_while_later_blobs_are_still_on_their_way() -> None:
    known = [calibration(layers) for layers in GROUPS]
    client = served([FerryCodec(0.01, c) for c in known])
    source = Known(*known)
    overlapped: list[bool] = []

    def before(count: int) -> None:
        if count == RUN_PAGES:  # all of the first layer group's first run has arrived
            overlapped.append(source.used.wait(30))

    client.before = before
    loaded = load(client, source)
    assert overlapped == [True]
    assert loaded.tokens == 16 * PAGES
    assert set(loaded.seconds) == {"lookup", "fetch", "decode"}
    assert loaded.bytes == sum(len(a) for a in client.answers.values() if isinstance(a, bytes))


def test_calibrations_are_read_before_the_first_blob_is_there() -> None:
    known = [calibration(layers) for layers in GROUPS]
    client = served([FerryCodec(0.01, c) for c in known])
    source = Known(*known)
    early: list[bool] = []
    client.before = lambda count: early.append(source.warmed.wait(30))
    assert load(client, source).tokens == 16 * PAGES
    assert all(early)


def test_a_calibration_that_nobody_has_is_the_reason() -> None:
    known = [calibration(layers) for layers in GROUPS]
    client = served([FerryCodec(0.01, c) for c in known])
    loaded = load(client, Known(known[0]))
    assert_prefix(loaded, 0)
    assert loaded.reason == CalibrationMissingError("").reason


@pytest.mark.parametrize("gap", [0, 1, RUN_PAGES])
def test_blobs_behind_a_gap_are_not_waited_for(gap: int) -> None:
    client = served(RAW)
    key = client.pages[gap][0].key
    client.answers[key] = BlobNotFoundError(str(key))
    client.order = lambda keys: [key, *(k for k in keys if k != key)]
    loaded = load(client)
    assert_prefix(loaded, gap)
    wanted = {info.key for page in client.pages[:gap] for info in page} | {key}
    assert client.closed
    assert wanted <= set(client.asked)
    if not gap:
        assert client.asked == [key]


def test_answers_that_never_come_are_a_gap() -> None:
    client = served(RAW)
    client.order = lambda keys: keys[:-3]
    loaded = load(client)
    assert 0 < loaded.pages < PAGES
    assert_prefix(loaded, loaded.pages)
    assert loaded.reason == "not_found"
