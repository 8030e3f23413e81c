"""Elections over three real etcd members: one holder at a time, whatever happens."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from etcd_servers import EtcdCluster, until

from kvferry.cluster.election.clock import wakeful_clock
from kvferry.cluster.election.election import Election
from kvferry.cluster.election.tenure import Tenure
from kvferry.cluster.election.turn import ElectedTurn
from kvferry.cluster.etcd import operations as ops
from kvferry.errors import ConfigError
from kvferry.settings import StoreSettings

pytestmark = pytest.mark.processes
TTL_S = 4.0


class Clock:
    """The real one, set forward by a test as if the process had stood still."""

    skipped_s = 0.0

    def __call__(self) -> float:
        return wakeful_clock() + self.skipped_s


@pytest.fixture
def prefix(request: pytest.FixtureRequest, members: EtcdCluster) -> str:
    members.heal()
    return f"/{request.node.name}"


class Candidate:
    """An election that runs, with a client of its own."""

    def __init__(self, members: EtcdCluster, prefix: str, name: str) -> None:
        self.clock = Clock()
        self.etcd = members.client()
        self.election = Election(
            self.etcd, "office", name, prefix=prefix, ttl_s=TTL_S, clock=self.clock
        )
        self.task = asyncio.ensure_future(self.election.run())

    async def end(self) -> None:
        """Resign and go."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.etcd.aclose()

    async def wins(self) -> Tenure:
        """Its tenure, once it has won."""
        async with asyncio.timeout(60):
            return await self.election.won()

    async def loses(self) -> None:
        """Wait until it holds the office no more."""
        async with asyncio.timeout(60):
            await self.election.lost()


@asynccontextmanager
async def _candidates(
    members: EtcdCluster, prefix: str, *names: str
) -> AsyncIterator[list[Candidate]]:
    """The first of them has won when this yields."""
    async with AsyncExitStack() as stack:
        made = []
        for name in names:
            made.append(Candidate(members, prefix, name))
            stack.push_async_callback(made[-1].end)
            await made[0].wins()
        yield made


async def test_one_wins_and_the_other_knows_who(members: EtcdCluster, prefix: str) -> None:
    async with _candidates(members, prefix, "a:1", "b:2") as (first, second):

        async def told() -> bool:
            return second.election.holder == "a:1"

        await until(told)
        assert first.election.held
        assert not second.election.held
        assert second.election.tenure is None
        assert first.election.holder == "a:1"


async def test_whoever_resigns_is_followed_at_once_under_a_later_term(
    members: EtcdCluster, prefix: str
) -> None:
    async with _candidates(members, prefix, "a", "b") as (first, second):
        before = await first.wins()
        await first.end()
        after = await second.wins()
        assert after.term > before.term
        assert not first.election.held
        async with members.client() as etcd:
            assert not (await etcd.transact([before.guard()], [])).held
            assert (await etcd.transact([after.guard()], [])).held


async def test_offices_and_prefixes_do_not_meet(members: EtcdCluster, prefix: str) -> None:
    async with AsyncExitStack() as stack:
        for place, office in enumerate(("coordinator", "sweeper")):
            for under in (prefix, f"{prefix}2"):
                etcd = await stack.enter_async_context(members.client())
                election = Election(etcd, office, f"c{place}", prefix=under, ttl_s=TTL_S)
                task = asyncio.ensure_future(election.run())
                stack.push_async_callback(asyncio.gather, task, return_exceptions=True)
                stack.callback(task.cancel)
                async with asyncio.timeout(60):
                    await election.won()


async def test_a_holder_that_stood_still_holds_nothing_when_it_wakes(
    members: EtcdCluster, prefix: str
) -> None:
    async with _candidates(members, prefix, "a", "b") as (first, second):
        before = await first.wins()
        first.clock.skipped_s += TTL_S  # as after a SIGSTOP, or a lid that was closed
        assert not first.election.held  # at once, before anything ran
        assert first.election.tenure is None
        # etcd did not count that time: it turns out to be ours as before.
        again = await first.wins()
        assert again == before
        assert not second.election.held


async def test_a_lease_that_is_over_is_noticed_and_campaigned_for_again(
    members: EtcdCluster, prefix: str
) -> None:
    async with _candidates(members, prefix, "a", "b") as (first, second), members.client() as etcd:
        before = await first.wins()
        item = (await etcd.get(before.key)).item
        assert item is not None
        await etcd.revoke(item.lease)
        after = await second.wins()
        await first.loses()
        assert after.term > before.term
        await second.end()
        assert (await first.wins()).term > after.term


async def test_a_key_that_another_one_made_is_not_ours(members: EtcdCluster, prefix: str) -> None:
    async with _candidates(members, prefix, "a") as (first,), members.client() as etcd:
        before = await first.wins()
        # By a hand: the office is vacated although the lease lives on.
        await etcd.transact([], [ops.delete(before.key)])
        await first.loses()
        assert (await first.wins()).term > before.term


async def test_the_leading_member_of_etcd_dies_and_the_term_goes_on_or_grows(
    members: EtcdCluster, prefix: str
) -> None:
    async with _candidates(members, prefix, "a", "b") as (first, second):
        before = await first.wins()
        members.leader().signal(signal.SIGKILL)
        held: list[Tenure | None] = []

        async def settled() -> bool:
            """etcd answers again, and one of them holds what it says is held."""
            async with members.client(timeout_s=20.0) as etcd:
                item = (await etcd.get(before.key)).item
            held[:] = [c.election.tenure for c in (first, second)]
            return item is not None and any(t and t.created == item.created for t in held)

        await until(settled)
        assert all(t is None or t.term >= before.term for t in held)


async def test_without_etcd_the_holder_steps_down_and_comes_back_by_itself(
    members: EtcdCluster, prefix: str
) -> None:
    async with _candidates(members, prefix, "a") as (first,):
        before = await first.wins()
        members.signal(signal.SIGKILL)
        await first.loses()
        assert not first.election.held
        members.heal()
        assert (await first.wins()).term >= before.term


async def test_a_term_that_others_have_seen_is_outgrown(members: EtcdCluster, prefix: str) -> None:
    async with _candidates(members, prefix, "a") as (first,):
        before = await first.wins()
        await first.election.outgrow(before.term)  # nothing later than ours
        assert (await first.wins()).term == before.term
        await first.election.outgrow(before.term + 1000)
        assert (await first.wins()).term == before.term + 1001
        await first.end()
        async with _candidates(members, prefix, "b") as (second,):
            assert (await second.wins()).term > before.term + 1001


async def test_ten_candidates_never_hold_it_together(members: EtcdCluster, prefix: str) -> None:
    terms: list[int] = []

    async def serve(candidate: Candidate) -> None:
        tenure = await candidate.wins()
        assert [c.election.held for c in all_].count(True) == 1
        terms.append(tenure.term)
        await candidate.end()

    all_ = [Candidate(members, prefix, f"c{i}") for i in range(10)]
    async with asyncio.timeout(120):
        await asyncio.gather(*map(serve, all_))
    assert terms == sorted(set(terms))
    assert len(terms) == 10


async def test_of_two_that_ask_whose_turn_it_is_one_is_told_so(
    members: EtcdCluster, prefix: str
) -> None:
    settings = StoreSettings(etcd=members.endpoints, etcd_prefix=prefix[:40])
    one = await ElectedTurn.open(settings, "sweeper", "a")
    two = await ElectedTurn.open(settings, "sweeper", "b")
    assert await one.mine()
    assert not await two.mine()
    assert await one.mine()
    await one.give_up()
    assert await two.mine()
    assert not await one.mine()
    for turn in (one, two):
        await turn.give_up()  # twice is once


async def test_without_etcd_it_is_nobodys_turn() -> None:
    settings = StoreSettings(etcd="http://127.0.0.1:1")
    turn = await ElectedTurn.open(settings, "sweeper", "a")
    assert not await turn.mine()
    await turn.give_up()


async def test_a_lease_of_no_use_is_refused(members: EtcdCluster) -> None:
    async with members.client() as etcd:
        for ttl_s in (0.5, 10_000.0):
            with pytest.raises(ConfigError, match="lease_ttl_s"):
                Election(etcd, "office", "a", ttl_s=ttl_s)
