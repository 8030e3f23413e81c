"""Journal, spool, remembered state, triggers, backoff and events by themselves."""

import asyncio
import stat
import time
from collections import Counter
from pathlib import Path

import pytest
from node_samples import blob

from kvferry.cluster.backoff import Backoff, Breaker
from kvferry.errors import BlobNotFoundError, ConfigError
from kvferry.node.events import QUEUE_LENGTH, EventHub
from kvferry.node.journal import Journal, Pending
from kvferry.node.pressure import IdleWatch, PressureWatch, memory_used_share
from kvferry.node.spool import Spool
from kvferry.node.state import NodeState
from kvferry.node.triggers import Triggers
from kvferry.proto.v1 import coordinator_pb2 as pb


def pending(name: str, **fields: object) -> Pending:
    key, data = blob(name)
    return Pending(key=key, size=len(data), **fields)  # type: ignore[arg-type]


def test_journal_keeps_everything_in_order(tmp_path: Path) -> None:
    path = tmp_path / "uploads.sqlite"
    items = [
        pending("a"),
        pending("b", expires_unix_s=12.5, replaces=blob("old")[0], lease="x" * 32),
        pending("c"),
    ]
    journal = Journal(path)
    journal.add(items[:1])
    journal.add(items[1:])
    journal.remove([items[0].key])
    # Not closed: the daemon was killed.
    assert Journal(path).load() == items[1:]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal.close()
    journal.close()


def test_damaged_journal_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "uploads.sqlite"
    path.write_bytes(b"this is no database" * 100)
    journal = Journal(path)
    assert journal.load() == []
    journal.add([pending("a")])
    assert len(journal.load()) == 1
    assert (tmp_path / "uploads.sqlite.damaged").exists()


def test_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    (a, raw), (b, _) = blob("a"), blob("b")
    spool.write(a, raw)
    assert (spool.read(a), spool.has(a), spool.has(b)) == (raw, True, False)
    spool.write(b, memoryview(b"xyz"))
    spool.keep_only([a])
    with pytest.raises(BlobNotFoundError):
        spool.read(b)
    spool.remove(a)
    spool.remove(a)
    assert not spool.has(a)


def test_state_is_held_by_one_and_remembers(tmp_path: Path) -> None:
    state = NodeState(tmp_path / "node")
    with pytest.raises(ConfigError, match="no other"):
        NodeState(tmp_path / "node")
    first = state.next_incarnation()
    assert state.salt() == b""
    assert state.policy() is None
    state.save_salt(bytes(32))
    state.save_policy(pb.Policy(name="kept", version=7))
    state.close()
    again = NodeState(tmp_path / "node")
    assert again.next_incarnation() > first
    assert again.salt() == again.own_salt() == bytes(32)
    assert again.policy() == pb.Policy(name="kept", version=7)
    (tmp_path / "node" / "policy.bin").write_bytes(b"\xff\xff\xff")
    assert again.policy() is None
    again.close()


def test_incarnation_grows_also_after_the_folder_was_emptied(tmp_path: Path) -> None:
    numbers = []
    for name in ("a", "b", "c"):
        state = NodeState(tmp_path / name)
        numbers += [state.next_incarnation(), state.next_incarnation()]
        state.close()
        time.sleep(0.01)
    assert numbers == sorted(set(numbers))


def test_own_salt_is_made_once(tmp_path: Path) -> None:
    state = NodeState(tmp_path)
    salt = state.own_salt()
    assert len(salt) == 32
    assert state.own_salt() == salt
    state.close()


def test_pressure_is_said_once_until_it_is_over() -> None:
    watch = PressureWatch()
    shares = [0.5, 0.85, 0.9, 0.84, 0.79, 0.81, 0.74, 0.81]
    assert [watch.update(s, 0.8) for s in shares] == [
        False, True, False, False, False, False, False, True,
    ]  # fmt: skip
    assert not watch.update(0.99, 0.0)
    assert 0.0 < memory_used_share() < 1.0


async def test_a_policy_that_comes_to_name_pressure_finds_it_beginning() -> None:
    policy = pb.Policy(memory_mark=0.001, when=[pb.TRIGGER_TURN_END])
    fired: Counter[str] = Counter()
    triggers = Triggers(EventHub(), IdleWatch(), lambda: policy, fired)
    watch = asyncio.create_task(triggers.watch())
    await asyncio.sleep(0.1)
    assert fired["trigger_memory_pressure"] == 1  # told once, and again only after it is over
    policy.when.append(pb.TRIGGER_MEMORY_PRESSURE)
    for _ in range(400):
        await asyncio.sleep(0.05)
        if fired["trigger_memory_pressure"] == 2:
            break
    watch.cancel()
    assert fired["trigger_memory_pressure"] == 2


def test_idle_is_said_once_after_activity() -> None:
    now = [0.0]
    watch = IdleWatch(clock=lambda: now[0])
    now[0] = 100.0
    assert not watch.update(10)
    watch.touch()
    now[0] = 109.0
    assert not watch.update(10)
    assert not watch.update(0)
    now[0] = 110.0
    assert watch.update(10)
    now[0] = 500.0
    assert not watch.update(10)


def test_backoff_doubles_within_bounds() -> None:
    backoff = Backoff(first_s=1.0, most_s=8.0)
    for most in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert most / 2 <= backoff.next_s() <= most
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_breaker_opens_and_recovers() -> None:
    now = [0.0]
    breaker = Breaker(threshold=2, first_s=1.0, most_s=4.0, clock=lambda: now[0])
    breaker.failed()
    assert breaker.healthy
    assert breaker.allow()
    breaker.failed()
    assert not breaker.allow()
    now[0] += 1.0
    # One may try; the others go on waiting until it is known how that went.
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.succeeded()
    assert [breaker.allow(), breaker.allow()] == [True, True]


async def test_slow_watcher_loses_its_oldest_events() -> None:
    hub = EventHub()
    watch = hub.watch()
    first = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    assert hub.watchers == 1
    for _ in range(QUEUE_LENGTH):
        hub.trigger(pb.TRIGGER_TURN_END)
    hub.trigger(pb.TRIGGER_IDLE)
    assert (await first).trigger == pb.TRIGGER_TURN_END
    rest = [(await anext(watch)).trigger for _ in range(QUEUE_LENGTH - 1)]
    assert rest[-1] == pb.TRIGGER_IDLE
    hub.close()
    assert [event async for event in watch] == []
    assert hub.watchers == 0
