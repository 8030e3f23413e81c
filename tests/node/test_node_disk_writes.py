"""What is written to disk in a day: counted over restarts, kills and changes of the day."""

import json
from collections import Counter
from pathlib import Path

import pytest
from node_samples import blob

from kvferry.cluster.backends import open_backend
from kvferry.cluster.repository import PutSpec
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.node.disk_writes import (
    DAY_S,
    KEPT_DAYS,
    STEP_BYTES,
    YEAR_DAYS,
    DiskWrites,
    default_budget,
    rated_endurance,
)
from kvferry.node.journal import Journal
from kvferry.node.memory_tier import MemoryTier
from kvferry.node.put_session import NodePut
from kvferry.node.tiers import Tiers
from kvferry.node.upload_queue import UploadQueue

MIB, GIB = 1 << 20, 1 << 30
START = 20_000 * DAY_S + 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def counted(path: Path, clock: Clock, budget: int = GIB, endurance: int = 1000 * GIB) -> DiskWrites:
    return DiskWrites(path / "disk_writes.json", budget, endurance, clock)


def test_the_budget_holds_over_a_clean_restart_and_ends_with_the_day(tmp_path: Path) -> None:
    clock = Clock()
    writes = counted(tmp_path, clock)
    assert writes.reserve(700 * MIB)
    writes.save(exact=True)
    again = counted(tmp_path, clock)
    assert again.now().today == 700 * MIB
    assert not again.reserve(400 * MIB)
    assert again.now().today == 700 * MIB
    assert again.reserve(300 * MIB)
    again.refund(300 * MIB)
    again.save(exact=True)
    clock.now += DAY_S
    next_day = counted(tmp_path, clock)
    assert next_day.now().today == 0
    assert next_day.now().total == 700 * MIB
    assert next_day.reserve(GIB)


def test_a_kill_forgets_nothing_and_overstates_by_a_step_at_most(tmp_path: Path) -> None:
    clock = Clock()
    writes = counted(tmp_path, clock)
    written = 0
    for _ in range(200):
        assert writes.reserve(MIB)
        written += MIB
        if writes.due:
            writes.save()
        killed = counted(tmp_path, clock).now()
        assert written <= killed.today <= written + STEP_BYTES
        assert killed.total >= written


def test_the_day_turns_under_a_running_daemon(tmp_path: Path) -> None:
    clock = Clock()
    writes = counted(tmp_path, clock, budget=100)
    assert writes.reserve(100)
    assert not writes.reserve(1)
    clock.now += DAY_S
    assert writes.reserve(60)
    assert (writes.now().today, writes.now().total) == (60, 160)


def test_a_clock_that_jumps_gives_no_second_budget_and_does_not_lock_up(tmp_path: Path) -> None:
    clock = Clock()
    writes = counted(tmp_path, clock, budget=100)
    assert writes.reserve(80)
    clock.now -= 7200.0  # before midnight
    assert not writes.reserve(30)
    clock.now += 4000 * DAY_S
    assert writes.reserve(90)
    writes.save(exact=True)
    clock.now = START + DAY_S
    back = counted(tmp_path, clock, budget=100)
    assert not back.reserve(20)
    clock.now += DAY_S
    assert back.reserve(20)


def test_lifetime_is_what_is_left_at_the_pace_of_the_last_days(tmp_path: Path) -> None:
    clock = Clock()
    writes = counted(tmp_path, clock, budget=GIB, endurance=1000 * GIB)
    assert writes.now().lifetime_years == 0.0
    for _ in range(10):
        assert writes.reserve(GIB)
        clock.now += DAY_S
    clock.now -= DAY_S
    now = writes.now()
    assert now.per_day == pytest.approx(GIB)
    assert now.lifetime_years == pytest.approx(990 / YEAR_DAYS)
    for _ in range(3 * KEPT_DAYS):  # what was long ago says nothing
        clock.now += DAY_S
        writes.reserve(MIB)
    assert writes.now().per_day < 2 * MIB
    writes.save()
    kept = json.loads((tmp_path / "disk_writes.json").read_text())
    assert len(kept["days"]) <= KEPT_DAYS


def test_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", '{"day": 1}', '{"day": "x", "today": 1, "total": 1, "days": {}}'):
        (tmp_path / "disk_writes.json").write_text(text)
        assert counted(tmp_path, Clock()).now().total == 0


def test_defaults_let_a_disk_last_ten_years() -> None:
    endurance = rated_endurance(512 * GIB)
    budget = default_budget(endurance, 8 * GIB)
    assert endurance / budget / YEAR_DAYS == pytest.approx(10)
    assert default_budget(rated_endurance(MIB), 8 * GIB) == 8 * GIB


async def test_beyond_the_budget_blobs_are_kept_in_memory_and_still_accepted(
    tmp_path: Path,
) -> None:
    backend = open_backend(f"file://{tmp_path / 'blobs'}")
    disk = await LocalStore.open(backend, StoreLimits(budget_bytes=GIB), source="disk")
    journal = Journal(tmp_path / "uploads.sqlite")
    writes = counted(tmp_path, Clock(), budget=5000)
    counters: Counter[str] = Counter()
    tiers = Tiers(MemoryTier(MIB), disk, counters, writes)

    async def nobody(_: object) -> bytes:
        raise AssertionError

    uploads = UploadQueue(None, journal, GIB, nobody, nobody, counters)  # type: ignore[arg-type]
    try:
        for name, on_disk in (("first", True), ("second", False), ("third", False)):
            key, data = blob(name, size=3000)
            put = await NodePut.open(tiers, uploads, PutSpec(key=key, size=len(data)), counters)
            await put.write(data)
            assert await put.finish()
            assert await tiers.on_disk(key) == on_disk
            assert (await tiers.read(key))[0] == data
        assert counters["disk_refused_write_budget"] == 2
        assert writes.now().today == len(data)
        # A put that never wrote anything has cost nothing.
        key, data = blob("called off", size=1000)
        put = await NodePut.open(tiers, uploads, PutSpec(key=key, size=len(data)), counters)
        await put.abort()
        assert writes.now().today < len(data) + 3200
    finally:
        await disk.aclose()
        journal.close()
