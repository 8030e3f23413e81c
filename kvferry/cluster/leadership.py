"""Whether this coordinator may act: always where it is alone, else while it is elected."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Gauge

from kvferry.cluster.election.election import Election
from kvferry.cluster.election.tenure import Tenure
from kvferry.errors import ConfigError, FerryError, NotLeaderError

log = logging.getLogger(__name__)

OFFICE = "coordinator"
RETRY_S = 0.2

Role = Literal["alone", "leader", "standby"]


class Leadership:
    """Won in two steps: the office, then whatever has to be read before acting.

    Belongs to one event loop. Without an election it is held from the start (`alone`).
    """

    def __init__(self, election: Election | None = None) -> None:
        self._election = election
        self._ready: Tenure | None = None  # the tenure that all was read in

    @property
    def acting(self) -> bool:
        """Whether we may decide and answer at this moment."""
        return self._election is None or self._now() is not None

    @property
    def term(self) -> int:
        """The fencing token that goes with what we say; 0: alone, or not acting."""
        tenure = self._now()
        return tenure.term if tenure is not None else 0

    @property
    def role(self) -> Role:
        """What we are at this moment."""
        if self._election is None:
            return "alone"
        return "leader" if self.acting else "standby"

    @property
    def leader(self) -> str:
        """HOST:PORT of the leader as last seen; empty: none known."""
        return self._election.holder if self._election is not None else ""

    def require(self) -> int:
        """The term to act under. Raises: NotLeaderError."""
        if self._election is None:
            return 0
        tenure = self._now()
        if tenure is None:
            held = self._election.held  # won, but not ready yet: nobody else is, either
            raise NotLeaderError("this coordinator", "" if held else self._election.holder)
        return tenure.term

    def _now(self) -> Tenure | None:
        if self._election is None or self._ready is None:
            return None
        tenure = self._election.tenure
        # The term may have outgrown another one meanwhile; the tenure is the same.
        return tenure if tenure is not None and tenure.created == self._ready.created else None

    def add_metrics(self, registry: CollectorRegistry) -> None:
        """Show whether we lead, and in which term."""
        for name, text, value in (
            ("leading", "1: this one decides", lambda: self.acting),
            ("term", "Term that it leads in, 0: it stands by, or is alone", lambda: self.term),
        ):
            Gauge(f"kvferry_coordinator_{name}", text, registry=registry).set_function(value)

    def announce(self, address: str) -> None:
        """Where nodes find us, once we serve; empty: an address that would tell them nothing."""
        if self._election is not None and not self._election.candidate:
            self._election.name(address)

    async def outgrow(self, seen: int) -> None:
        """A node has seen term ``seen``: ours becomes later. Raises: StoreUnavailableError."""
        if self._election is not None and seen > self.term:
            await self._election.outgrow(seen)

    async def prepare(self, check: Callable[[], Awaitable[None]]) -> None:
        """Before the first campaign: ``check``, again and again until etcd answers.

        Raises: ConfigError from ``check``: standing by would be of no use.
        """
        problem = ""
        while self._election is not None:
            try:
                await check()
                return
            except ConfigError:
                raise
            except FerryError as exc:
                if str(exc) != problem:
                    problem = str(exc)
                    log.warning("waiting for etcd: %s", exc)
                await asyncio.sleep(RETRY_S)

    async def run(self, accede: Callable[[], Awaitable[None]], retire: Callable[[], None]) -> None:
        """Campaign, act, stand by, for ever; ends only when cancelled, and resigns then.

        Args:
            accede: reads what has to be known before acting, each time.
            retire: called as soon as the office is not ours any more.
        """
        election = self._election
        if election is None:
            await asyncio.Event().wait()
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(election.run())
            while True:
                tenure = await election.won()
                try:
                    await accede()
                except FerryError as exc:
                    log.warning("won term %d, but cannot lead yet: %s", tenure.term, exc)
                    await asyncio.sleep(RETRY_S)
                    continue
                self._ready = tenure
                if self.acting:
                    log.info("leading in term %d", tenure.term)
                    await election.lost()
                    log.warning("standing by: term %d is over", tenure.term)
                self._ready = None
                retire()
