"""Our etcd client against three real members: what it says, and what it outlasts."""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
from etcd_servers import EtcdCluster, until

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.etcd import operations as ops
from kvferry.cluster.etcd.access import EtcdAccess, parse_endpoints
from kvferry.cluster.etcd.client import EtcdClient
from kvferry.errors import ConfigError, StoreUnavailableError

pytestmark = pytest.mark.processes


@pytest.fixture
async def etcd(members: EtcdCluster) -> AsyncIterator[EtcdClient]:
    members.heal()
    async with members.client(timeout_s=20.0) as client:
        yield client


async def _put(etcd: EtcdClient, key: bytes, value: bytes, lease: int = 0) -> int:
    return (await etcd.transact([], [ops.put(key, value, lease)])).revision


async def test_keys_are_put_read_and_listed_in_order(etcd: EtcdClient) -> None:
    assert (await etcd.get(b"/a/1")).item is None
    first = await _put(etcd, b"/a/1", b"one")
    await _put(etcd, b"/a/2", b"two")
    await _put(etcd, b"/b", b"other")
    found = await etcd.get(b"/a/1")
    assert found.item is not None
    assert (found.item.value, found.item.created, found.item.modified) == (b"one", first, first)
    listed = await etcd.list(b"/a/")
    assert [(i.key, i.value) for i in listed.items] == [(b"/a/1", b"one"), (b"/a/2", b"two")]
    assert len((await etcd.list(b"/a/", limit=1)).items) == 1


async def test_a_transaction_does_one_or_the_other(etcd: EtcdClient) -> None:
    key = b"/txn"
    made = await etcd.transact([ops.absent(key)], [ops.put(key, b"1"), ops.get(key)])
    assert made.held
    assert made.reads[0] is not None
    assert made.reads[0].created == made.revision
    again = await etcd.transact([ops.absent(key)], [ops.put(key, b"2")], [ops.get(key)])
    assert not again.held
    assert again.reads[0] is not None
    assert again.reads[0].value == b"1"
    at = made.revision
    assert (await etcd.transact([ops.unchanged(key, at)], [ops.put(key, b"3")])).held
    assert not (await etcd.transact([ops.unchanged(key, at)], [ops.put(key, b"4")])).held
    assert (await etcd.transact([ops.created_at(key, at)], [ops.delete(key)])).held
    assert (await etcd.get(key)).item is None


async def test_a_key_goes_with_its_lease(etcd: EtcdClient) -> None:
    lease, ttl_s = await etcd.grant(2)
    assert ttl_s >= 2
    await _put(etcd, b"/leased", b"x", lease)
    assert await etcd.keep_alive(lease) == ttl_s
    await etcd.revoke(lease)
    assert (await etcd.get(b"/leased")).item is None
    assert await etcd.keep_alive(lease) == 0
    await etcd.revoke(lease)  # over already


async def test_a_lease_that_nobody_keeps_ends(etcd: EtcdClient) -> None:
    lease, _ = await etcd.grant(2)
    await _put(etcd, b"/forgotten", b"x", lease)

    async def gone() -> bool:
        return (await etcd.get(b"/forgotten")).item is None

    await until(gone)


async def test_a_watch_tells_of_changes_since_a_revision(etcd: EtcdClient) -> None:
    revision = await _put(etcd, b"/w/1", b"before")
    await _put(etcd, b"/w/1", b"after")
    watch = etcd.watch(b"/w/", revision, prefix=True)
    async with asyncio.timeout(20):
        (missed,) = await anext(watch)
        assert (missed.item.value, missed.deleted) == (b"after", False)
        await etcd.transact([], [ops.put(b"/w/2", b"new"), ops.delete(b"/w/1")])
        both = await anext(watch)
    assert {(c.item.key, c.deleted) for c in both} == {(b"/w/2", False), (b"/w/1", True)}
    await watch.aclose()


async def test_it_goes_on_while_one_member_is_killed_and_one_stands_still(
    members: EtcdCluster, etcd: EtcdClient
) -> None:
    await _put(etcd, b"/failover", b"0")
    for round_, number in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
        members.leader().signal(number)
        await _put(etcd, b"/failover", b"%d" % round_)
        found = (await etcd.get(b"/failover")).item
        assert found is not None
        assert found.value == b"%d" % round_
        members.heal()


async def test_a_watch_at_a_member_that_dies_ends_with_an_error(members: EtcdCluster) -> None:
    members.heal()
    async with members.client(timeout_s=20.0) as etcd:
        watch = etcd.watch(b"/dies", (await etcd.get(b"/dies")).revision)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.2)
        asked = etcd.where
        next(m for m in members.members if asked.endswith(m.address)).signal(signal.SIGKILL)
        async with asyncio.timeout(30):
            with pytest.raises(StoreUnavailableError):
                await waiting
            assert etcd.where != asked
            await _put(etcd, b"/dies", b"x")


async def test_no_etcd_is_one_error_within_the_deadline() -> None:
    access = EtcdAccess(endpoints=parse_endpoints(f"127.0.0.1:{free_port()}"))
    async with EtcdClient(access, timeout_s=1.0) as etcd:
        with pytest.raises(StoreUnavailableError, match=r"etcd at 127\.0\.0\.1"):
            await etcd.get(b"/a")


def test_endpoints_are_read_or_refused() -> None:
    found = parse_endpoints("http://a:1, https://[::1]:2379/,c:3")
    assert [(e.address, e.tls) for e in found] == [
        ("a:1", False), ("[::1]:2379", True), ("c:3", False),
    ]  # fmt: skip
    for bad in ("", "a", "http://a", "ftp://a:1", "a:70000", "http://u@a:1", "a:1," * 17):
        with pytest.raises(ConfigError, match="etcd"):
            parse_endpoints(bad)


def test_the_end_of_a_prefix_is_after_all_of_it() -> None:
    for prefix in (b"/a", b"/a\xff", b"\x00"):
        end = ops.end_of(prefix)
        assert prefix + b"\xff" * 9 < end
        assert not end.startswith(prefix)
