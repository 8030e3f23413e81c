"""Leader election with leases in etcd, for any office.

The office is one key, bound to a lease of its holder; who creates it has won. Its create
revision is the fencing token (the method of etcd's ``clientv3/concurrency``, with one key
in place of a queue of candidates; M. Burrows, "The Chubby lock service", OSDI 2006, section
2.4, for sequencers). Two never hold it at once: a holder counts its lease from *before* it
asked for it, on a clock of its own, less a margin; etcd counts from after.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

from kvferry.cluster.election.clock import wakeful_clock
from kvferry.cluster.election.tenure import MAX_TERM, Tenure
from kvferry.cluster.etcd import operations as ops
from kvferry.cluster.etcd.client import EtcdClient
from kvferry.errors import ConfigError, FerryError, ProtocolError

log = logging.getLogger(__name__)

MIN_TTL_S = 2.0  # what etcd grants at least with its usual timeouts
MAX_TTL_S = 600.0
MARGIN_SHARE = 0.2
BEATS = 5
RETRY_S = 0.2
RESIGN_S = 1.0


class Election:
    """A candidate for one office: campaigns, holds, loses, campaigns again.

    Keep `run` going in a task. Before each thing that only the holder may do, look at
    `held`; make writes transactions under `Tenure.guard`; tell others the term::

        while True:
            tenure = await election.won()
            while election.held:
                await sweep_a_little(tenure.term)
    """

    def __init__(
        self,
        etcd: EtcdClient,
        office: str,
        candidate: str,
        *,
        prefix: str = "/kvferry",
        ttl_s: float = 3.0,
        clock: Callable[[], float] = wakeful_clock,
    ) -> None:
        """
        Args:
            office: what there is one of in all under ``prefix``: "coordinator", "sweeper".
            candidate: who we are; the others read it as `holder`. An address, say.
            ttl_s: after so long without a sign of life another one wins.
            clock: seconds; must count while the machine sleeps.
        Raises: ConfigError.
        """
        if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise ConfigError("lease_ttl_s", ttl_s, f"{MIN_TTL_S:g} to {MAX_TTL_S:g} seconds")
        self._etcd, self._clock = etcd, clock
        self._office, self._candidate = office, candidate.encode()
        self._key = f"{prefix}/election/{office}".encode()
        self._offset_key = f"{prefix}/election/{office}.offset".encode()
        self._ttl_s = float(math.ceil(ttl_s))
        self._lease = 0
        self._granted_s = 0.0
        self._tenure: Tenure | None = None
        self._until = 0.0
        self._holder = ""
        self._changed = asyncio.Event()
        self._problem = ""

    @property
    def held(self) -> bool:
        """Whether we hold the office at this moment; False well before anybody else can."""
        return self._tenure is not None and self._clock() < self._until

    @property
    def tenure(self) -> Tenure | None:
        """Ours, while `held`."""
        return self._tenure if self.held else None

    @property
    def holder(self) -> str:
        """The candidate that held the office when we last saw; empty: none."""
        return self._candidate.decode() if self.held else self._holder

    @property
    def candidate(self) -> str:
        """Who we are."""
        return self._candidate.decode()

    def name(self, candidate: str) -> None:
        """Who we are, from the next campaign on; for an address that is known late."""
        self._candidate = candidate.encode()

    async def won(self) -> Tenure:
        """Wait until we hold the office."""
        while True:
            changed = self._changed
            if (tenure := self.tenure) is not None:
                return tenure
            await changed.wait()

    async def lost(self) -> None:
        """Wait until we do not hold it (any more); it may come back under the same term."""
        while self.held:
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._until - self._clock())):
                    await changed.wait()

    async def run(self) -> None:
        """Campaign and hold for ever. Cancelled, it resigns: the next one wins at once."""
        try:
            while True:
                try:
                    if self._tenure is None:
                        await self._campaign()
                    await self._hold()
                    self._problem = ""
                except FerryError as exc:
                    self._tell(exc)
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._resign()

    async def outgrow(self, seen: int) -> None:
        """Somebody has seen term ``seen``; if it is later than ours, etcd was set up anew.

        Ours becomes later than it, where we still hold the office. Raises: as `EtcdClient`.
        """
        tenure = self.tenure
        if tenure is None or not tenure.term < seen < MAX_TERM:
            return
        offset = seen + 1 - tenure.created
        put = ops.put(self._offset_key, b"%d" % offset)
        outcome = await self._etcd.transact([tenure.guard()], [put])
        if outcome.held and self._tenure == tenure:
            self._tenure = replace(tenure, term=seen + 1)
            self._wake()

    # -- campaign -------------------------------------------------------------------

    async def _campaign(self) -> None:
        """Until we have won."""
        while True:
            found = await self._etcd.get(self._key)
            self._problem = ""
            if found.item is None:
                self._holder = ""
                if await self._try():
                    return
                continue
            self._holder = found.item.value.decode(errors="replace")
            await self._until_vacant(found.revision)

    async def _until_vacant(self, revision: int) -> None:
        """Until something happens to the key, or for a lease's time: watches can be mute."""
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(self._ttl_s),
                aclosing(self._etcd.watch(self._key, revision)) as changes,
            ):
                await anext(changes)

    async def _try(self) -> bool:
        """Take the vacant office; False: another one was faster."""
        asked = self._clock()
        lease, granted_s = await self._etcd.grant(round(self._ttl_s))
        reads = [ops.get(self._key), ops.get(self._offset_key)]
        try:
            outcome = await self._etcd.transact(
                [ops.absent(self._key)],
                [ops.put(self._key, self._candidate, lease), *reads],
                reads,
            )
            item, offset = outcome.reads[0], _offset(outcome.reads[1])
        except BaseException:
            await self._drop(lease)
            raise
        # Also where the transaction did not hold: an attempt before it may have.
        if item is None or item.lease != lease:
            await self._drop(lease)
            return False
        self._lease, self._granted_s = lease, granted_s
        self._tenure = Tenure(item.created + offset, self._key, item.created)
        self._until = asked + granted_s * (1 - MARGIN_SHARE)
        log.info("%s: ours, term %d", self._office, self._tenure.term)
        self._wake()
        return True

    async def _drop(self, lease: int) -> None:
        """A lease that is not needed; it ends by itself where etcd does not answer."""
        with contextlib.suppress(FerryError):
            await self._etcd.revoke(lease)

    # -- hold -----------------------------------------------------------------------

    async def _hold(self) -> None:
        """Until the office is certainly not ours any more.

        Where etcd does not answer, `held` ends with the lease's time, and begins anew
        when it turns out that etcd kept the lease all the while.
        """
        beat_s = self._granted_s / BEATS
        while True:
            await asyncio.sleep(beat_s if self.held else RETRY_S)
            was_held = self.held
            try:
                async with asyncio.timeout(self._patience_s()):
                    if not await self._renew():
                        break
                self._problem = ""
            except TimeoutError:
                pass
            except FerryError as exc:
                self._tell(exc)
            if self.held != was_held:
                log.warning(
                    "%s: %s", self._office, "ours as before" if self.held else "no word from etcd"
                )
                self._wake()
        log.warning("%s: lost", self._office)
        await self._give_up()

    def _patience_s(self) -> float:
        """So that the end of our time is noticed when it comes."""
        left = self._until - self._clock()
        return left if left > 0 else self._granted_s

    async def _renew(self) -> bool:
        """Prolong; False: the lease or the key is gone."""
        tenure, asked = self._tenure, self._clock()
        lives_s = await self._etcd.keep_alive(self._lease)
        if tenure is None or lives_s <= 0:
            return False
        item = (await self._etcd.get(self._key)).item
        if item is None or item.created != tenure.created:
            return False
        self._until = asked + min(lives_s, self._granted_s) * (1 - MARGIN_SHARE)
        return True

    async def _give_up(self) -> None:
        """Out of office; the key goes too, where it is still ours."""
        lease, self._lease = self._lease, 0
        self._tenure, self._until = None, 0.0
        self._wake()
        if lease:
            await self._drop(lease)

    async def _resign(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESIGN_S):
                await self._give_up()

    def _wake(self) -> None:
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    def _tell(self, exc: FerryError) -> None:
        """Once for each problem, not for each attempt."""
        if str(exc) != self._problem:
            log.warning("%s: %s", self._office, exc)
        self._problem = str(exc)


def _offset(item: ops.Item | None) -> int:
    if item is None:
        return 0
    if not item.value.isdigit() or int(item.value) >= MAX_TERM:
        raise ProtocolError(f"{item.key!r} in etcd is no number of kvferry's: delete the key")
    return int(item.value)
