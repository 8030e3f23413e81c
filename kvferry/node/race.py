"""One blob from whoever has it first: a source that stalls is overtaken by another.

Hedging as in Dean and Barroso, "The tail at scale", CACM 56 (2013): a second request once
the first has taken longer than 95 of 100 do on that link, and no more extra bytes than a
share of all; the first verified answer wins, the other is cancelled.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.errors import (
    BlobNotFoundError,
    FerryError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kvferry.node.lanes import Lanes
from kvferry.node.link_meter import MOST_SILENCE_S, Transfer
from kvferry.node.remotes import Remote
from kvferry.node.tiers import Data, checked_info
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

# Of what nobody has told the size.
UNKNOWN_SIZE = 1 << 20
HEDGE_SHARE = 0.08
LOOK_AGAIN_S = 0.05
# It may have to wake disks, and is the last resort: given up later than a peer that is silent.
STORE_SILENCE_S = 10.0
# A peer that has not said a word for so long counts as one that does not answer.
MUTE_S = 0.25
# When nothing tells who has a blob, so many peers are asked.
ASK_MOST = 8


@dataclass(eq=False, slots=True)
class _Attempt:
    remote: Remote
    transfer: Transfer
    check_s: float
    hedge: bool = False


class Race:
    """One blob. Used once."""

    def __init__(self, lanes: Lanes, key: BlobKey) -> None:
        self._lanes, self._key = lanes, key
        self._size = lanes.directory.size_of(key) or UNKNOWN_SIZE
        self._tried: set[Remote] = set()
        self._running: dict[asyncio.Task[Data], _Attempt] = {}
        self._asked_around = False
        self._charged = 0
        self._over_budget = False

    async def run(self, worst: FerryError) -> tuple[Data, Remote]:
        """Verified bytes, and who sent them.

        Raises: the last error that was more than "not there"; ``worst`` if there was none.
        """
        try:
            while True:
                if not self._running and not await self._begin():
                    raise self._unasked() or worst
                done, _ = await asyncio.wait(
                    self._running, timeout=self._wait_s(), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    attempt = self._running.pop(task)
                    try:
                        data = task.result()
                    except FerryError as exc:
                        self._failed(attempt, exc)
                        if not isinstance(exc, BlobNotFoundError):
                            worst = exc
                        continue
                    self._won(attempt, data)
                    return data, attempt.remote
                if not done:
                    worst = self._late() or worst
        finally:
            self._lanes.extra.earn(self._charged)
            await self._stop(list(self._running))

    async def _begin(self) -> bool:
        """Start with the best source; False: there is none."""
        lanes = self._lanes
        found = await lanes.next(self._key, self._tried, self._size)
        if found is None and not self._asked_around:
            self._asked_around = True
            await lanes.directory.ask_around(self._key, ASK_MOST, lanes.ask_timeout_s)
            found = await lanes.next(self._key, self._tried, self._size)
        if found is not None:
            self._start(*found)
        return found is not None

    def _unasked(self) -> FerryError | None:
        """A store that nobody could ask may have it all the same."""
        store = self._lanes.store
        if store is None or store in self._tried:
            return None
        return StoreUnavailableError(store.name, "it has not answered lately")

    def _start(self, expected_s: float, remote: Remote, hedge: bool = False) -> None:
        meter = remote.meter
        transfer = meter.begin(self._size, expected_s)
        attempt = _Attempt(remote, transfer, meter.clock() + meter.patience_s(expected_s), hedge)
        self._tried.add(remote)
        task = asyncio.create_task(self._transfer(attempt))
        self._running[task] = attempt

    async def _transfer(self, attempt: _Attempt) -> Data:
        remote, transfer, lanes = attempt.remote, attempt.transfer, self._lanes
        whole = False
        try:
            data = await remote.get(
                self._key,
                local_only=remote is not lanes.store,
                timeout_s=lanes.timeout_s,
                on_bytes=lambda total: remote.meter.received(transfer, total),
            )
            whole = True
        finally:
            remote.meter.end(transfer, whole)
            lanes.freed()
        await asyncio.to_thread(checked_info, self._key, data)
        return data

    # -- waiting ----------------------------------------------------------------------

    def _wait_s(self) -> float:
        waits = []
        for attempt in self._running.values():
            meter = attempt.remote.meter
            now = meter.clock()
            silent_at = attempt.transfer.last_byte_s + meter.silence_s()
            check_s = min(attempt.check_s, silent_at) if silent_at > now else attempt.check_s
            waits.append(check_s - now)
        return max(0.001, min(waits))

    def _late(self) -> FerryError | None:
        """Nobody has answered in time: ask one more, or give up who is silent."""
        lanes, problem = self._lanes, None
        for task, attempt in list(self._running.items()):
            meter = attempt.remote.meter
            now = meter.clock()
            silent_s = now - attempt.transfer.last_byte_s
            stalled = silent_s > meter.silence_s()
            if now < attempt.check_s and not stalled:
                continue
            attempt.check_s = now + LOOK_AGAIN_S
            if attempt.transfer.ended:
                continue  # all of it is here, and is being verified
            if len(self._running) == 1 and self._overtake(attempt, now, stalled):
                continue
            limit_s = STORE_SILENCE_S if attempt.remote is lanes.store else MOST_SILENCE_S
            if silent_s > limit_s:
                problem = StoreTimeoutError(attempt.remote.name, f"silent for {silent_s:.1f} s")
                self._failed(attempt, problem)
                attempt.remote.breaker.failed()
                lanes.counters["stalls"] += 1
                del self._running[task]
                task.cancel()
        return problem

    def _overtake(self, attempt: _Attempt, now: float, stalled: bool) -> bool:
        """Ask a second source, where it would be sooner and the budget allows for it."""
        lanes, transfer = self._lanes, attempt.transfer
        found = lanes.best(lanes.open_to(self._key, self._tried), self._size)
        if found is None or (not stalled and found[0] >= _left_s(transfer, now)):
            return False
        if not lanes.extra.take(self._size):
            lanes.counters["hedges_over_budget"] += not self._over_budget
            self._over_budget = True
            return False
        self._charged += self._size
        lanes.counters["hedges"] += 1
        self._start(*found, hedge=True)
        return True

    # -- outcomes ---------------------------------------------------------------------

    def _failed(self, attempt: _Attempt, problem: FerryError) -> None:
        lanes, remote = self._lanes, attempt.remote
        lanes.counters[f"{lanes.kind(remote)}_{problem.reason}"] += 1
        if remote is lanes.store or isinstance(problem, StoreUnavailableError):
            return
        lanes.counters["stale_hints"] += isinstance(problem, BlobNotFoundError)
        lanes.directory.has_not(remote.name, self._key)

    def _won(self, winner: _Attempt, data: Data) -> None:
        lanes = self._lanes
        kind = lanes.kind(winner.remote)
        wasted = 0
        for attempt in self._running.values():
            wasted += attempt.transfer.received
            mute_s = attempt.remote.meter.clock() - attempt.transfer.started_s
            if not attempt.transfer.received and mute_s > MUTE_S and attempt.remote != lanes.store:
                attempt.remote.breaker.failed()  # not even a header came
        lanes.counters["hedge_extra_bytes"] += wasted
        lanes.counters["hedge_wins"] += winner.hedge
        lanes.counters[f"hits_{kind}"] += 1
        lanes.counters[f"fetched_bytes_{kind}"] += len(data)
        lanes.extra.earn(HEDGE_SHARE * len(data))
        self._charged = max(0, self._charged - wasted)

    async def _stop(self, tasks: Sequence[asyncio.Task[Data]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _left_s(transfer: Transfer, now: float) -> float:
    """When a transfer that is late may be over, at the pace that it has kept."""
    if not transfer.received:
        return float("inf")
    pace = transfer.received / max(1e-9, now - transfer.started_s)
    return max(transfer.left / pace, now - transfer.last_byte_s)
