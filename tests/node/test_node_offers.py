"""Offers: what is encoded and put, how far ahead, and what an error costs."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from node_samples import wait_for

from kvferry.cluster.repository import LookupQuery, LookupResult
from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.raw import RawCodec
from kvferry.errors import FerryError, StoreFullError, StoreUnavailableError
from kvferry.node.admission import admit
from kvferry.node.coding import CodedRange, Shard
from kvferry.node.offer import Coding, Offer
from kvferry.node.offers import Offers
from kvferry.node.puts import PUTS_UNDER_WAY
from kvferry.node.second_use import SecondUse
from kvferry.proto.container import read_header
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import node_pb2

SHARD = Shard(
    model_id=b"m" * 32, model_layers=2, model_heads=1, head_dim=4, layers=(0, 2), heads=(0, 1)
)
CODING = Coding(
    shard=SHARD,
    root=SHARD.root(b"s" * 32),
    pages=[CodedRange((0, 1), RawCodec()), CodedRange((1, 2), RawCodec())],
    tail=RawCodec(),
    tail_ttl_s=60,
)


class Cache:
    """A cache whose pages are counted as they are read for encoding."""

    def __init__(self) -> None:
        self.read: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def page(self, layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        self.read.append((layers, tokens))
        shape = (layers[1] - layers[0], 1, tokens[1] - tokens[0], 4)
        streams = {n: Stream(n, np.zeros(shape, np.float32), DType.FLOAT32) for n in "kv"}
        return PageTensors(layers, (0, 1), tokens, streams)

    def state_pages(self, tokens: tuple[int, int], part: int = 0) -> Iterator[PageTensors]:
        state = Stream("state.0.2d", np.zeros((2, 1, 1, 4), np.float32), DType.FLOAT32)
        yield PageTensors((0, 2), (0, 1), tokens, {state.name: state})


class Daemon:
    """Keeps what it is given, once it is told to answer."""

    def __init__(self, *, at_once: bool = True, seen: SecondUse | None = None) -> None:
        self.at_once, self.seen = at_once, seen
        self.held: dict[BlobKey, bytes] = {}
        self.under_way: list[Future[bool]] = []
        self.most = 0
        self.refused: FerryError | None = None

    def admit(
        self, keys: Sequence[BlobKey], *, again: bool = False
    ) -> "list[node_pb2.Admission.ValueType]":
        return admit(keys, [key in self.held for key in keys], self.seen, Counter(), again)

    def lookup(self, query: LookupQuery) -> LookupResult:
        return LookupResult(pages=[])

    def put_later(
        self, key: BlobKey, data: bytes, *, ttl_s: int = 0, replaces: BlobKey | None = None
    ) -> Future[bool]:
        put: Future[bool] = Future()
        self.under_way.append(put)
        self.most = max(self.most, sum(not p.done() for p in self.under_way))
        if replaces is not None:
            self.held.pop(replaces, None)
        if self.refused is not None:
            put.set_exception(self.refused)
            return put
        new = key not in self.held
        self.held[key] = data
        if self.at_once:
            put.set_result(new)
        return put

    def lost(self, error: FerryError) -> bool:
        return False

    def connected(self, timeout_s: float) -> bool:
        return True

    def answer_oldest(self) -> None:
        next(put for put in self.under_way if not put.done()).set_result(True)

    def spans(self, kind: str) -> list[tuple[int, int]]:
        headers = [read_header(data) for key, data in self.held.items() if key.kind == kind]
        return sorted({(h.token_start, h.token_end) for h in headers})


@contextmanager
def running(daemon: Daemon, counters: Counter[str]) -> Iterator[Offers]:
    offers = Offers(daemon, lambda: CODING, counters)
    try:
        yield offers
    finally:
        assert offers.close(20.0)


def test_the_next_blob_is_encoded_while_the_one_before_is_put() -> None:
    daemon, cache, counters = Daemon(at_once=False), Cache(), Counter[str]()
    with running(daemon, counters) as offers:
        assert offers.submit(Offer(tuple(range(256 * 4 + 128)), cache))
        # Nothing was answered yet, and the second blob is on its way already.
        wait_for(lambda: len(daemon.under_way) == PUTS_UNDER_WAY)
        time.sleep(0.1)
        assert len(daemon.under_way) == len(cache.read) == PUTS_UNDER_WAY
        assert counters["blobs_put"] == 0
        for answered in range(9):  # four pages of two layer ranges, and the tail
            wait_for(lambda n=answered: len(daemon.under_way) >= min(n + PUTS_UNDER_WAY, 9))
            daemon.answer_oldest()
        offers.wait()
    assert daemon.most == PUTS_UNDER_WAY
    assert counters["blobs_put"] == 9
    assert counters["bytes_put"] == sum(len(data) for data in daemon.held.values())


@pytest.mark.parametrize(
    "error", [StoreFullError("store", 1, 0), StoreUnavailableError("node", "gone")]
)
def test_an_error_costs_its_offer_and_no_other(error: FerryError) -> None:
    daemon, cache, counters = Daemon(), Cache(), Counter[str]()
    with running(daemon, counters) as offers:
        daemon.refused = error
        offers.submit(Offer(tuple(range(2000)), cache))
        offers.wait()
        assert counters[error.reason] == 1
        assert len(cache.read) <= PUTS_UNDER_WAY
        daemon.refused = None
        offers.submit(Offer(tuple(range(2000)), cache))
        offers.wait()
    assert counters["blobs_put"] == 15
    assert counters["bug"] == 0


def test_every_blob_says_whose_it_is() -> None:
    daemon, mine = Daemon(), replace(CODING, namespace_tag=0xFEDC_BA98_7654_3210)
    shard = replace(SHARD, model_states=2, states=(0, 2))
    offers = Offers(daemon, lambda: replace(mine, shard=shard), Counter())
    offers.submit(Offer(tuple(range(600)), Cache()))
    offers.wait()
    assert offers.close(20.0)
    headers = [read_header(data) for data in daemon.held.values()]
    assert {h.namespace_tag for h in headers} == {mine.namespace_tag}
    assert {key.kind for key in daemon.held} == {"page", "tail", "state"}


@pytest.mark.parametrize("tokens", [1, 4, 5, 132, 133, 256, 383, 384, 385, 640, 4225])
def test_pages_and_tail_hold_every_token_once(tokens: int) -> None:
    daemon, counters = Daemon(), Counter[str]()
    with running(daemon, counters) as offers:
        offers.submit(Offer(tuple(range(tokens)), Cache()))
        offers.wait()
    spans = daemon.spans("page") + daemon.spans("tail")
    assert [span[0] for span in spans] == [0, *[span[1] for span in spans[:-1]]]
    assert spans[-1][1] == tokens
    assert all(end <= tokens - 128 for _, end in daemon.spans("page"))


def test_known_blobs_are_neither_encoded_nor_put_again() -> None:
    daemon, cache, counters = Daemon(), Cache(), Counter[str]()
    with running(daemon, counters) as offers:
        offers.submit(Offer(tuple(range(900)), cache))
        offers.wait()
        before = len(cache.read)
        offers.submit(Offer(tuple(range(1000)), cache))
        offers.wait()
    # The page that became whole, in two layer ranges, is new; so is the tail.
    assert len(cache.read) - before == 1 + 2 * (len(daemon.spans("page")) - 3)
    assert len(daemon.spans("tail")) == 1
