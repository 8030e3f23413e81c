"""Only what comes back is stored, where that is wanted: over restarts, within bounds."""

from collections import Counter
from pathlib import Path

import pytest
from node_samples import blob, digest
from test_node_offers import Cache, Daemon, running

from kvferry.node.admission import DECLINED, HELD, WANTED, admit
from kvferry.node.offer import Offer
from kvferry.node.second_use import FILTER_BYTES, SecondUse
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2


def page(n: int, codec: str = "raw") -> BlobKey:
    return blob("page", page_key=digest(n), codec=codec)[0]


async def test_the_second_offer_of_the_same_tokens_is_wanted_also_after_a_restart(
    tmp_path: Path,
) -> None:
    path, counters = tmp_path / "offered.bin", Counter[str]()
    seen = SecondUse(path)
    keys = [page(n) for n in range(4)]
    assert admit(keys, [False, True, False, False], seen, counters) == [
        DECLINED, HELD, DECLINED, DECLINED,
    ]  # fmt: skip
    await seen.save()
    again = SecondUse(path)
    assert admit([page(0), page(9)], [False, False], again, counters) == [WANTED, DECLINED]
    # Another coding of the same tokens is no first use.
    assert admit([page(2, codec="zstd")], [False], again, counters) == [WANTED]
    assert counters["declined_first_use"] == 4


def test_an_offer_repeated_by_the_same_request_is_no_second_use(tmp_path: Path) -> None:
    seen, counters = SecondUse(tmp_path / "x"), Counter[str]()
    assert admit([page(1)], [False], seen, counters) == [DECLINED]
    assert admit([page(1), page(2)], [False, False], seen, counters, again=True) == [
        DECLINED, DECLINED,
    ]  # fmt: skip
    assert admit([page(1), page(2)], [False, False], seen, counters) == [WANTED, WANTED]


def test_calibrations_are_always_wanted_and_without_the_setting_all_are(tmp_path: Path) -> None:
    calibration = BlobKey("calibration", bytes(32))
    counters = Counter[str]()
    assert admit([calibration], [False], SecondUse(tmp_path / "x"), counters) == [WANTED]
    assert admit([page(1), page(1)], [False, True], None, counters) == [WANTED, HELD]


async def test_what_is_remembered_is_bounded_and_the_oldest_is_forgotten(tmp_path: Path) -> None:
    path, size = tmp_path / "offered.bin", 1500
    seen = SecondUse(path, size)
    known = page(0)
    keys = [BlobKey("page", digest(n), (0, 4), (0, 2), known.codec_id) for n in range(3000)]
    for key in keys:
        seen.note(key)
    await seen.save()
    assert path.stat().st_size < 2 * size + 256
    again = SecondUse(path, size)
    for memory in (seen, again):
        assert all(memory.seen(key) for key in keys[-1000:])
        assert sum(memory.seen(key) for key in keys[:900]) < 90
    assert not SecondUse(path).seen(keys[-1])  # of another size: left aside


@pytest.mark.parametrize("damage", [b"", b"x" * 100, b"KVFSEEN\x01" + bytes(2 * FILTER_BYTES + 36)])
def test_a_damaged_memory_is_left_aside(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "offered.bin").write_bytes(damage)
    assert not SecondUse(tmp_path / "offered.bin").seen(page(1))


def test_offers_store_what_comes_back_and_no_tail_behind_a_gap(tmp_path: Path) -> None:
    daemon, counters = Daemon(seen=SecondUse(tmp_path / "offered.bin")), Counter[str]()
    cache = Cache()
    with running(daemon, counters) as offers:
        tokens = tuple(range(900))  # three pages and a tail
        offers.submit(Offer(tokens, cache))
        offers.wait()
        assert not daemon.held
        assert not cache.read  # nothing was encoded in vain
        offers.submit(Offer(tokens, cache, again=True))
        offers.wait()
        assert not daemon.held
        offers.submit(Offer(tokens[:880], cache))
        offers.wait()
        assert daemon.spans("tail") == [(512, 880)]
        assert daemon.spans("page") == [(0, 256), (256, 512)]
        # A conversation that went on: its new page is new, and so is all behind it.
        offers.submit(Offer(tuple(range(1200)), cache))
        offers.wait()
        assert daemon.spans("page") == [(0, 256), (256, 512), (512, 768)]
        assert daemon.spans("tail") == [(512, 880)]
        # A short prompt is a tail alone.
        daemon.held.clear()
        for expected in ([], [(0, 100)]):
            offers.submit(Offer(tuple(range(5000, 5100)), cache))
            offers.wait()
            assert daemon.spans("tail") == expected
    assert counters["bug"] == 0


def test_kinds_that_end_by_themselves_are_told_apart(tmp_path: Path) -> None:
    seen = SecondUse(tmp_path / "x")
    tail = blob("t", page_key=digest(1), kind=blob_pb2.BLOB_KIND_TAIL)[0]
    seen.note(tail)
    assert seen.seen(tail)
    assert not seen.seen(page(1))
