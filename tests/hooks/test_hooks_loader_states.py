"""Rows, and the states at their end, in one request; what is done where one of them fails."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loader_samples import (
    KEYS,
    PAGES,
    RAW,
    SHARD,
    TOKENS,
    Served,
    add_state,
    load,
    loader,
    ring,
    served,
    whole,
)

from kvferry.errors import BlobNotFoundError
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.restore import RUN_PAGES
from kvferry.proto.keys import BlobKey

HYBRID = replace(SHARD, model_states=2, states=(0, 2))
LONG, SHORT = 16 * PAGES, 16 * (PAGES - 3)


def stored() -> tuple[Served, BlobKey, BlobKey]:
    client = served(RAW)
    return client, add_state(client, LONG), add_state(client, SHORT)


def lost(client: Served, key: BlobKey) -> None:
    client.answers[key] = BlobNotFoundError(str(key))


def damaged(client: Served, key: BlobKey) -> None:
    data = client.answers[key]
    assert isinstance(data, bytes)
    client.answers[key] = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


def assert_at(loaded: Loaded, tokens: int) -> None:
    assert loaded.tokens == tokens
    if not tokens:
        return
    (page,) = loaded.states[tokens]
    for name, stream in ring(tokens).streams.items():
        np.testing.assert_array_equal(page.streams[name].data, stream.data)
    assert loaded.tensors is not None
    rows = loaded.tensors.cut_tokens((0, tokens))
    for name, stream in whole().cut_tokens((0, tokens)).streams.items():
        np.testing.assert_array_equal(rows.streams[name].data, stream.data)


def test_states_come_with_the_rows_in_one_request() -> None:
    client, long, short = stored()
    loaded = load(client, shard=HYBRID)
    assert_at(loaded, LONG)
    assert client.requests == 1
    assert long in client.asked
    assert short not in client.asked
    assert not loaded.reason
    assert set(loaded.seconds) == {"lookup", "fetch", "decode"}


@pytest.mark.parametrize("fail", [lost, damaged])
def test_without_its_states_a_shorter_position_is_taken(fail: object) -> None:
    client, long, _ = stored()
    fail(client, long)  # type: ignore[operator]
    loaded = load(client, shard=HYBRID)
    assert_at(loaded, SHORT)
    assert client.requests == 2
    assert loaded.problems == [{lost: "not_found", damaged: "corrupt"}[fail]]  # type: ignore[index]


def test_rows_that_no_position_needs_are_not_waited_for() -> None:
    client, long, _short = stored()
    lost(client, long)
    client.order = lambda keys: sorted(keys, key=lambda key: key != long)
    loaded = load(client, shard=HYBRID)
    assert_at(loaded, SHORT)
    behind = {info.key for page in client.pages[RUN_PAGES:] for info in page}
    assert behind.isdisjoint(client.asked)


def test_states_behind_a_gap_in_the_rows_are_not_waited_for() -> None:
    client, long, short = stored()
    gap = client.pages[PAGES - 1][0].key
    lost(client, gap)
    client.order = lambda keys: [gap, *(k for k in keys if k != gap)]
    loaded = load(client, shard=HYBRID)
    assert_at(loaded, SHORT)
    assert long not in client.asked
    assert short in client.asked


@given(st.sets(st.integers(0, 2 * PAGES + 1)), st.permutations(range(2 * PAGES + 2)))
def test_whatever_fails_rows_and_states_are_of_one_position(
    failures: set[int], order: list[int]
) -> None:
    client, long, short = stored()
    keys = [*(info.key for page in client.pages for info in page), long, short]
    for index in failures:
        lost(client, keys[index])
    places = dict(zip(keys, order, strict=True))
    client.order = lambda asked: sorted(asked, key=lambda key: places[key])
    pages = min((index // 2 for index in failures if index < 2 * PAGES), default=PAGES)
    can = [
        at
        for at, index in ((LONG, 2 * PAGES), (SHORT, 2 * PAGES + 1))
        if at <= 16 * pages and index not in failures
    ]
    assert_at(load(client, shard=HYBRID), max(can, default=0))
    assert client.closed


def test_a_rank_without_rows_has_states_only() -> None:
    client, _, _ = stored()
    loaded = load(client, shard=replace(HYBRID, layers=(4, 4)))
    assert loaded.tokens == LONG
    assert loaded.tensors is None
    assert list(loaded.states) == [LONG]
    assert len(client.asked) == 1


def test_another_position_is_fetched_when_ranks_agree_on_it() -> None:
    client, _, short = stored()
    made = loader(client, shard=HYBRID)
    loaded = made.load(TOKENS, 5.0)
    assert short not in client.asked
    assert made.load_state(SHORT, loaded, float("inf"))
    assert made.load_state(SHORT, loaded, 0.0)  # it is here
    assert not made.load_state(SHORT + 1, loaded, float("inf"))
    assert set(loaded.states) == {LONG, SHORT}
    assert len(KEYS) == PAGES
