"""Offers of a hook whose daemon is killed and started again; real processes, no model."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from node_samples import Machines, wait_for
from test_node_offers import CODING, Cache

from kvferry.cluster.repository import ListQuery
from kvferry.codec.base import PageTensors
from kvferry.node.client import NodeClient
from kvferry.node.offer import Offer
from kvferry.node.offers import QUEUE_LENGTH, Offers

pytestmark = pytest.mark.processes

TOKENS = tuple(range(256 * 4 + 128))
BLOBS = 9  # four pages of two layer ranges, and the tail


class Interrupted(Cache):
    """A cache in the midst of whose encoding something happens, once."""

    def __init__(self, at: int, what: threading.Event) -> None:
        super().__init__()
        self._at, self._what = at, what

    def page(self, layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        if len(self.read) == self._at:
            self._what.set()
            time.sleep(0.5)
        return super().page(layers, tokens)


@contextmanager
def offering(
    client: NodeClient, counters: Counter[str], restart_wait_s: float = 60.0
) -> Iterator[Offers]:
    offers = Offers(client, lambda: CODING, counters, restart_wait_s=restart_wait_s)
    try:
        yield offers
    finally:
        assert offers.close(30.0)


def stored(client: NodeClient) -> int:
    """How many blobs of `CODING` the daemon holds, each of them whole."""
    keys = [info.key for info in client.list(ListQuery(model_id=CODING.shard.model_id))]
    return sum(isinstance(data, memoryview) for data in client.get_many(keys).values())


def test_an_offer_made_while_the_daemon_restarts_is_taken(tmp_path: Path) -> None:
    counters = Counter[str]()
    with Machines(tmp_path) as machines:
        node, client = machines.node(), machines.client()
        client.hello()
        with offering(client, counters) as offers:
            node.process.kill()
            node.process.wait()
            # The connection has known for long that nobody is there, and is at its longest
            # pause between two attempts.
            time.sleep(3.0)
            taken = [offers.submit(Offer(TOKENS, Cache())) for _ in range(QUEUE_LENGTH + 3)]
            # The model's thread has waited for nothing: no daemon has come back yet.
            # One is being worked on, the queue holds so many more, the rest is counted.
            assert QUEUE_LENGTH <= taken.count(True) <= QUEUE_LENGTH + 1
            assert counters == {"queue_full": taken.count(False)}
            machines.node()
            assert offers.wait(60.0)
        assert counters["unavailable"] == 0
        assert counters["blobs_put"] >= BLOBS  # the tail is put with every offer
        assert stored(client) == BLOBS


def test_what_a_killed_daemon_had_not_taken_is_put_again(tmp_path: Path) -> None:
    counters, reached = Counter[str](), threading.Event()
    with Machines(tmp_path) as machines:
        node, client = machines.node(), machines.client()
        with offering(client, counters) as offers:
            cache = Interrupted(4, reached)
            assert offers.submit(Offer(TOKENS, cache))
            assert reached.wait(30.0)
            node.process.kill()
            node.process.wait()
            machines.node()
            assert offers.wait(60.0)
        assert counters["unavailable"] == counters["bug"] == 0
        assert stored(client) == BLOBS
        # What the daemon had said yes to is not encoded a second time.
        assert len(cache.read) < 2 * BLOBS - 2


def test_a_daemon_that_stays_away_costs_one_wait(tmp_path: Path) -> None:
    counters = Counter[str]()
    with Machines(tmp_path) as machines:
        node, client = machines.node(), machines.client()
        client.hello()
        with offering(client, counters, restart_wait_s=4.0) as offers:
            node.process.kill()
            node.process.wait()
            assert offers.submit(Offer(TOKENS, Cache()))
            assert offers.wait(30.0)
            assert counters == {"unavailable": 1}
            began = time.monotonic()
            for _ in range(2):
                assert offers.submit(Offer(TOKENS, Cache()))
            assert offers.wait(30.0)
            assert counters == {"unavailable": 3}
            assert time.monotonic() - began < 2 * 4.0
            machines.node()
            wait_for(lambda: client.connected(1.0))
            assert offers.submit(Offer(TOKENS, Cache()))
            assert offers.wait(30.0)
        assert counters["blobs_put"] == BLOBS


def test_closing_waits_for_no_daemon(tmp_path: Path) -> None:
    counters = Counter[str]()
    with Machines(tmp_path) as machines:
        node, client = machines.node(), machines.client()
        client.hello()
        node.process.kill()
        node.process.wait()
        offers = Offers(client, lambda: CODING, counters, restart_wait_s=600.0)
        assert offers.submit(Offer(TOKENS, Cache()))
        assert not offers.wait(0.5)
        assert offers.close(30.0)
        assert counters == {"unavailable": 1}
