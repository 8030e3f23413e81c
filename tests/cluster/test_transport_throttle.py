"""The token bucket: what passes, what waits, and what is not owed."""

import asyncio

from kvferry.cluster.throttle import BURST_S, Throttle


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def bucket(rate: float, monkeypatch: object) -> tuple[Throttle, Clock]:
    clock = Clock()

    async def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)  # type: ignore[attr-defined]
    return Throttle(rate, clock), clock


async def test_bytes_take_as_long_as_the_rate_says(monkeypatch: object) -> None:
    throttle, clock = bucket(1000.0, monkeypatch)
    for _ in range(10):
        assert await throttle.take(500)
    assert abs(clock.now - 100.0 - (5.0 - BURST_S)) < 1e-6


async def test_a_pause_saves_up_no_more_than_the_burst(monkeypatch: object) -> None:
    throttle, clock = bucket(1000.0, monkeypatch)
    await throttle.take(1000)
    clock.now = start = 500.0
    assert await throttle.take(1000)
    assert abs(clock.now - start - (1.0 - BURST_S)) < 1e-6


async def test_what_does_not_fit_the_deadline_is_not_owed(monkeypatch: object) -> None:
    throttle, clock = bucket(1000.0, monkeypatch)
    assert not await throttle.take(1_000_000, within_s=1.0)
    before = clock.now
    assert abs(before - 101.0) < 1e-6
    assert await throttle.take(500, within_s=1.0)
    assert clock.now - before <= 0.5 + 1e-6


async def test_without_a_rate_nothing_waits_and_lifting_it_forgets_debts(
    monkeypatch: object,
) -> None:
    throttle, clock = bucket(10.0, monkeypatch)
    await throttle.take(100)
    before = clock.now
    throttle.bytes_per_s = 0.0
    assert await throttle.take(1 << 40)
    throttle.bytes_per_s = 1000.0
    assert await throttle.take(10)
    assert clock.now == before
