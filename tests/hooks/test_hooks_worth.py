"""A restore that would take longer than prefill is not begun; one that got quicker is."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlx.core as mx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvferry.cli.demo.cluster import Cluster
from kvferry.codec.mlx.load import LoadedModel
from kvferry.node.hooks import HookOptions, PrefixCache
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.rates import Rate
from kvferry.node.hooks.steps import Step
from kvferry.node.hooks.worth import (
    MARGIN,
    STORED_ANYWAY,
    Cost,
    Together,
    Worth,
    best_step,
    pays_to_store,
)

LENGTH = 700
SLOW = 20_000.0
PREFILL_S = 0.6

amounts = st.integers(0, 10**9)
rates = st.none() | st.floats(1.0, 1e12)


@st.composite
def growing(draw: st.DrawFn) -> list[Step]:
    """Prefixes of growing length, far and near bytes growing with them."""
    steps, tokens, far, near = [], 0, 0, 0
    for _ in range(draw(st.integers(1, 20))):
        tokens += draw(st.integers(1, 4096))
        far += draw(amounts)
        near += draw(amounts)
        steps.append(Step(tokens, far, near))
    return steps


@given(
    growing(), st.builds(Cost, rates, rates, rates, rates), st.floats(0, 10), st.integers(0, 5000)
)
def test_what_is_fetched_is_foreseen_to_be_quicker_than_prefill(
    steps: list[Step], cost: Cost, wait_s: float, at_hand: int
) -> None:
    tokens = best_step(steps, cost, wait_s, at_hand)
    if cost.prefill is None:
        assert tokens == steps[-1].tokens
        return
    saved = {
        step.tokens: (step.tokens - at_hand) / cost.prefill - MARGIN * (wait_s + cost.seconds(step))
        for step in steps
    }
    assert saved.get(tokens, 0.0) == max(0.0, *saved.values())


def test_a_dear_tail_is_left_out_and_the_pages_before_it_are_fetched() -> None:
    steps = [Step(256 * n, 100_000 * n, 0) for n in range(1, 9)]
    steps.append(Step(2300, 5_800_000, 0))
    cost = Cost(prefill=200.0, link=400_000.0, near=None, decode=10_000.0)
    assert best_step(steps, cost) == 2048
    assert best_step(steps, Cost(200.0, 40_000.0, None, 10_000.0)) == 0
    assert best_step(steps, Cost(200.0, 40_000_000.0, None, 10_000.0)) == 2300


@given(
    st.builds(Cost, rates, rates, rates, rates),
    st.floats(0, 1e7),
    st.floats(0, 10),
    st.integers(1, 10**6),
)
def test_what_is_unknown_is_stored_and_longer_prefixes_pay_where_shorter_do(
    cost: Cost, bytes_per_token: float, wait_s: float, tokens: int
) -> None:
    pays = pays_to_store(tokens, cost, bytes_per_token, wait_s)
    known = [rate for rate in (cost.link, cost.near) if rate]
    if not cost.prefill or not known or not bytes_per_token:
        assert pays
        return
    each = bytes_per_token / max(known) + (1 / cost.decode if cost.decode else 0.0)
    assume(abs(each * cost.prefill / MARGIN - 1) > 1e-6)  # no coin to be tossed
    if pays:
        assert pays_to_store(2 * tokens, cost, bytes_per_token, wait_s)
    else:
        assert not pays_to_store(max(1, tokens // 2), cost, bytes_per_token, wait_s)
        step = Step(tokens, int(bytes_per_token * tokens), 0)
        assert not cost.link or best_step([step], cost, wait_s) == 0


def test_what_is_computed_sooner_than_restored_is_not_stored_but_now_and_then() -> None:
    prefill = Rate()
    worth = Worth(prefill, 1.0)
    assert worth.stores(2048)
    loaded = Loaded(bytes=200_000, far_bytes=200_000, tokens=1000)
    loaded.seconds = {"fetch": 1.0, "decode": 0.01, "lookup": 0.001}
    worth.learn(loaded)
    assert worth.stores(2048)  # the model's rate is not known yet
    prefill.add(10_000, 1.0)
    assert sum(worth.stores(2048) for _ in range(4 * STORED_ANYWAY)) == 4
    slow = Rate()
    slow.add(1000, 2.0)
    again = Worth(slow, 1.0)
    again.learn(loaded)
    assert all(again.stores(2048) for _ in range(STORED_ANYWAY))
    always = Worth(prefill, 1.0, always=True)
    always.learn(loaded)
    assert all(always.stores(64) for _ in range(STORED_ANYWAY))


def test_what_was_waited_for_decoding_is_shared_out_among_codecs() -> None:
    worth = Worth(Rate(), 1.0)
    loaded = Loaded(tokens=1000, bytes=1000)
    loaded.decoding("ferry", 600_000, 1.5)
    loaded.decoding("ferry", 400_000, 1.5)  # two threads at once
    loaded.decoding("affine", 1_000_000, 1.0)
    loaded.decoding("raw", 10, 1e-6)  # too little to tell
    loaded.seconds = {"decode": 0.9, "commit": 0.1}
    worth.learn(loaded)
    assert worth.decode_values_per_s == pytest.approx({"ferry": 1e6 / 0.75, "affine": 4e6})


def test_who_wants_everything_gets_it_whatever_it_costs() -> None:
    prefill = Rate()
    prefill.add(100_000, 0.1)
    steps, loaded = [Step(256, 10_000, 0), Step(512, 20_000, 0)], Loaded(bytes=9000, far_bytes=9000)
    loaded.seconds["fetch"] = 1.0
    for always, expected in ((False, 0), (True, 512)):
        worth = Worth(prefill, 1.0, always=always)
        worth.learn(loaded)
        assert worth.choose(steps, 0.0, 0) == expected


def test_what_the_machine_holds_itself_does_not_wait_for_a_slow_link() -> None:
    cost = Cost(prefill=200.0, link=1_000.0, near=1e9, decode=10_000.0)
    near = [Step(256 * n, 0, 100_000 * n) for n in range(1, 9)]
    assert best_step(near, cost) == 2048
    part = [
        Step(s.tokens, max(0, s.near_bytes - 300_000), min(s.near_bytes, 300_000)) for s in near
    ]
    assert best_step(part, cost) == 768


@pytest.mark.parametrize("fails", [(), (0,), (1,), (0, 1)])
def test_every_rank_enters_once_and_all_fetch_the_minimum(fails: tuple[int, ...]) -> None:
    answers: list[list[int]] = [[], []]
    posted: list[list[int]] = [[0], [0]]
    barrier = Barrier(2, timeout=20)

    def rank(index: int) -> int:
        def all_min(values: list[int]) -> list[int]:
            posted[index] = list(values)
            barrier.wait()
            lowest = [min(pair) for pair in zip(*posted, strict=True)]
            barrier.wait()
            answers[index] += lowest
            return lowest

        together = Together(all_min, lambda steps, wait_s, at_hand: steps[index].tokens)
        try:
            if index in fails:
                raise OSError("lookup")
            return together([Step(512, 0, 0), Step(256, 0, 0)], 0.0, 0)[1]
        except OSError:
            return -1
        finally:
            together.settle()

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(rank, range(2)))
    lowest = 0 if fails else 256
    assert answers == [[lowest], [lowest]]
    assert outcomes == [-1 if index in fails else lowest for index in range(2)]


# -- with a real store and daemons ----------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Cluster]:
    """The first node stores, the second one has to fetch."""
    cluster = Cluster(tmp_path, nodes=2)
    cluster.set_policy("exact")
    with cluster:
        yield cluster


def prompt(seed: int) -> list[int]:
    return [(seed * 7919 + 31 * i + i * i) % 61 for i in range(LENGTH)]


def prefilled(model: LoadedModel, cache: list[object], tokens: list[int]) -> list[object]:
    mx.eval(model.model(mx.array([tokens]), cache=cache))
    return cache


def restored(prefix: PrefixCache, tokens: list[int]) -> int:
    _, rest = prefix.restore(tokens)
    prefix.worth.wait_probe(20.0)
    return len(tokens) - len(rest)


@pytest.mark.processes
def test_a_link_that_is_too_slow_is_left_alone_until_it_is_quick_again(
    tiny: LoadedModel, pair: Cluster, tmp_path: Path
) -> None:
    prompts = [prompt(seed) for seed in range(6)]
    storing = HookOptions(socket=pair.sockets[0], cache_dir=tmp_path)
    with PrefixCache(tiny, storing) as here:
        assert here.ready()
        for tokens in prompts[1:]:
            cache, rest = here.restore(tokens)
            assert here.offer(tokens, prefilled(tiny, cache, rest))
        assert here.flush()

    options = HookOptions(socket=pair.sockets[1], cache_dir=tmp_path, link_retry_s=0.0)
    with PrefixCache(tiny, options) as there:
        assert there.ready()
        cache, rest = there.restore(prompts[0])
        assert rest == prompts[0]
        time.sleep(PREFILL_S)  # a larger model's prefill
        there.offer(prompts[0], prefilled(tiny, cache, rest))
        assert there.flush()
        there.throttle(SLOW)
        assert restored(there, prompts[1]) < LENGTH - 1  # this shows how slow the link is
        assert there.counters["miss_not_worth_it"] == 0

        assert restored(there, prompts[2]) == 0
        assert there.counters["miss_not_worth_it"] == 1
        report = there.last_restore
        assert report is not None
        assert (report.reason, report.bytes) == ("not_worth_it", 0)

        there.throttle(0.0)
        assert restored(there, prompts[3]) == 0  # still believed to be slow, and tried
        assert there.counters["miss_not_worth_it"] == 2
        assert restored(there, prompts[4]) == LENGTH - 1
        there.throttle(SLOW)
        assert restored(there, prompts[5]) < LENGTH - 1  # the link is bad again
        # These blobs are on this machine now: no link is in their way.
        assert restored(there, prompts[4]) == LENGTH - 1
        assert set(there.worth.decode_values_per_s) == {"raw", "zstd"}
