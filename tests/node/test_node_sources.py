"""Which source a blob is fetched from, and what is known of a link: pure, with a clock of ours."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvferry.node.byte_budget import ByteBudget
from kvferry.node.link_meter import FORGET_S, MEASURED_BYTES, LinkMeter
from kvferry.node.sources import DEFAULT_BYTES_PER_S, STORE_HANDICAP, Source, by_arrival

RATES = st.one_of(st.just(0.0), st.floats(1e3, 1e10))
SIZES = st.integers(1, 10**8)


@st.composite
def sources(draw: st.DrawFn) -> list[Source]:
    return [
        Source(
            f"n{i}",
            draw(RATES),
            draw(st.floats(0, 2)),
            draw(st.integers(0, 10**9)),
            is_store=i == 0 and draw(st.booleans()),
        )
        for i in range(draw(st.integers(1, 6)))
    ]


def known(source: Source) -> Source:
    """All known, so that changing another one does not change what is taken for its own."""
    return Source(
        source.name,
        source.bytes_per_s or DEFAULT_BYTES_PER_S,
        source.latency_s or 0.001,
        source.queued_bytes,
        source.is_store,
    )


@given(sources(), SIZES)
def test_the_first_is_the_one_that_is_expected_first(found: list[Source], size: int) -> None:
    ranked = by_arrival(found, size)
    assert {source for _, source in ranked} == set(found)
    weighed = [s * (STORE_HANDICAP if source.is_store else 1) for s, source in ranked]
    assert weighed == sorted(weighed)
    assert all(seconds > 0 for seconds, _ in ranked)


@given(sources(), SIZES, st.floats(1.0, 100.0), st.integers(0, 10**9), st.floats(0, 5))
def test_what_got_better_or_others_worse_changes_no_first_choice(
    found: list[Source], size: int, faster: float, more: int, longer: float
) -> None:
    found = [known(source) for source in found]
    first = by_arrival(found, size)[0][1]
    rest = [source for source in found if source is not first]
    better = Source(
        first.name, first.bytes_per_s * faster, first.latency_s, first.queued_bytes, first.is_store
    )
    assert by_arrival([*rest, better], size)[0][1] == better
    worse = [
        Source(s.name, s.bytes_per_s, s.latency_s + longer, s.queued_bytes + more, s.is_store)
        for s in rest
    ]
    assert by_arrival([*worse, first], size)[0][1] == first


@given(
    st.lists(st.floats(1e5, 1e8), min_size=1, max_size=4),
    st.lists(st.integers(10**4, 10**6), min_size=1, max_size=7),
)
def test_a_batch_ends_hardly_later_than_in_the_best_split(
    rates: list[float], sizes: list[int]
) -> None:
    queued = [0] * len(rates)
    for size in sizes:
        views = [Source(str(i), rate, 0.0, queued[i]) for i, rate in enumerate(rates)]
        queued[int(by_arrival(views, size)[0][1].name)] += size
    ends = max(held / rate for held, rate in zip(queued, rates, strict=True))
    best = float("inf")
    for split in itertools.product(range(len(rates)), repeat=len(sizes)):
        loads = [0.0] * len(rates)
        for at, size in zip(split, sizes, strict=True):
            loads[at] += size / rates[at]
        best = min(best, max(loads))
    assert ends <= best + (len(rates) - 1) * max(sizes) / sum(rates) + 1e-9


def test_an_unknown_link_is_tried_beside_a_known_one() -> None:
    views = [Source("known", 10e6, 0.001, 5_000_000), Source("new")]
    assert by_arrival(views, 1 << 20)[0][1].name == "new"
    assert by_arrival([Source("store", is_store=True), Source("peer")], 1)[0][1].name == "peer"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(MEASURED_BYTES, 10**8), st.floats(1e4, 1e9), st.integers(1, 8))
def test_the_rate_is_that_of_the_link_however_many_share_it(
    size: int, rate: float, together: int
) -> None:
    clock = Clock()
    meter = LinkMeter(clock)
    took = size * together / rate
    assume(took < FORGET_S / 2)
    transfers = [meter.begin(size, took) for _ in range(together)]
    assert meter.queued_bytes == size * together
    clock.now += took
    for transfer in transfers:
        meter.received(transfer, size)
    for transfer in transfers:
        meter.end(transfer, whole=True)
    assert meter.under_way == meter.queued_bytes == 0
    assert meter.bytes_per_s == pytest.approx(rate, rel=1e-6)
    clock.now += FORGET_S + 1
    assert meter.bytes_per_s == 0.0  # it may be another by now


def test_a_link_that_stalls_counts_as_slow_while_it_does() -> None:
    clock = Clock()
    meter = LinkMeter(clock)
    first = meter.begin(10**7, 0.1)
    clock.now += 0.1
    meter.received(first, 10**7)
    meter.end(first, whole=True)
    assert meter.bytes_per_s == pytest.approx(1e8)
    stuck = meter.begin(10**7, 0.1)
    clock.now += 1.0
    assert meter.bytes_per_s < 1e5
    meter.end(stuck, whole=False)
    meter.end(stuck, whole=False)
    assert meter.under_way == 0


def test_patience_follows_what_the_link_has_shown() -> None:
    clock = Clock()
    steady, wild = LinkMeter(clock), LinkMeter(clock)
    for n in range(40):
        for meter, late in ((steady, 1.0), (wild, 5.0 if n % 10 == 0 else 1.0)):
            transfer = meter.begin(10**6, 0.1)
            clock.now += 0.1 * late
            meter.received(transfer, 10**6)
            meter.end(transfer, whole=True)
    assert steady.patience_s(1.0) < LinkMeter(clock).patience_s(1.0) < wild.patience_s(1.0)


def test_silence_is_judged_by_the_pauses_that_a_link_makes() -> None:
    clock = Clock()
    quick, slow = LinkMeter(clock), LinkMeter(clock)
    for meter, pause in ((quick, 0.001), (slow, 0.4)):
        transfer = meter.begin(10**6, 1.0)
        for total in range(10**5, 10**6, 10**5):
            clock.now += pause
            meter.received(transfer, total)
        meter.end(transfer, whole=True)
    assert quick.silence_s() < slow.silence_s() <= LinkMeter(clock).silence_s()


def test_a_budget_is_spent_comes_back_and_never_grows_beyond_itself() -> None:
    clock = Clock()
    budget = ByteBudget(1000, per_s=10.0, clock=clock)
    assert budget.take(900)
    assert not budget.take(200)
    assert budget.left == 100
    clock.now += 10.0
    assert budget.take(200)
    assert budget.left == 0
    budget.earn(50)
    assert budget.left == 50
    clock.now += 1e6
    assert budget.left == 1000
