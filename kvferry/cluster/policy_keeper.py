"""The policy in force: who decided it, who is told, and the file that it may come from."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator_client import REPEAT_S
from kvferry.cluster.coordinator_metrics import CoordinatorMetrics
from kvferry.cluster.intent import (
    MAX_VERSION,
    POLICY,
    Intent,
    IntentStore,
    Source,
    dump_intent,
    parse_intent,
)
from kvferry.errors import ConfigError, QueueFullError, StoreUnavailableError
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

MAX_WATCHERS = 4096
MAX_ATTEMPTS = 8


class PolicyKeeper:
    """Holds one policy, gives every new one the next version, tells all who watch.

    Lives on one event loop. `begin` before it decides anything, and again where another
    coordinator may have decided since; `look_at_file` from time to time; `close`. One that
    stands by keeps `follow` going instead.
    """

    def __init__(
        self, store: IntentStore, policy_file: Path | None, metrics: CoordinatorMetrics
    ) -> None:
        self._store = store
        self._file = policy_file
        self._metrics = metrics
        self._intent = Intent(policy=pb.Policy(), source="built-in")
        self._changed = asyncio.Event()
        self._deciding = asyncio.Lock()
        self._closed = False
        self._watchers = 0
        self._last_digest = ""  # of the file's content at the last look
        self._refused = ""  # digest of the content that was refused
        self._problem = ""

    async def begin(self, *, strict: bool = True) -> None:
        """Go on from what was kept; the file wins where it changed since.

        Raises: StoreUnavailableError; ConfigError where ``strict``, the file cannot be
            used and nothing was in force before.
        """
        async with self._deciding:
            kept = await self._refresh()
        if self._file is not None:
            await self.look_at_file(stable=True)
            if strict and not kept and self._problem:
                await asyncio.to_thread(policies.load_policy, self._file)  # raises
        if self.source == "built-in":
            # A newer release may have another default than the one that was kept.
            await self.decide(policies.default_policy(), "built-in")

    async def follow(self) -> None:
        """Take over what another coordinator decides, for ever."""
        async with aclosing(self._store.changes(POLICY)) as changes:
            async for raw in changes:
                try:
                    self._take(parse_intent(raw, self._store.where))
                except ConfigError as exc:
                    log.error("a policy that cannot be used was put beside us: %s", exc)

    async def _refresh(self) -> bool:
        """Take over what is kept; False: nothing that can be used is."""
        raw = await self._store.read(POLICY)
        if raw is None:
            return False
        try:
            self._take(parse_intent(raw, self._store.where))
        except ConfigError as exc:
            log.error("the policy that was kept is damaged (%s): set aside", exc)
            await self._store.set_aside(POLICY)
            return False
        return True

    @property
    def policy(self) -> pb.Policy:
        """The policy in force. Not to be changed."""
        return self._intent.policy

    @property
    def source(self) -> Source:
        """Who decided the policy in force."""
        return self._intent.source

    @property
    def problem(self) -> str:
        """Why the policy file is not what is in force; empty where it is, or there is none."""
        return self._problem

    async def decide(
        self,
        policy: pb.Policy,
        source: Source,
        *,
        file_digest: str = "",
        based_on: int | None = None,
    ) -> pb.Policy:
        """Put a policy in force under the next version; durable before it is given out.

        An equal one of the same source stays under its version. ``based_on``: the version
        that it was made from; where another is in force by now, that one stays.

        Raises: ConfigError for one that cannot hold; StoreUnavailableError where it
            cannot be written down (the old one stays in force).
        """
        policies.check_policy(policy)

        def next_after(kept: Intent) -> Intent:
            if based_on is not None and based_on != kept.policy.version:
                return kept
            new = pb.Policy()
            new.CopyFrom(policy)
            new.term = 0  # of the leader that pushes it
            new.version = kept.policy.version
            if new != kept.policy or source != kept.source or not new.version:
                new.version += 1
            return Intent(policy=new, source=source, file_digest=file_digest or kept.file_digest)

        async with self._deciding:
            await self._put(next_after)
            return self.policy

    async def outgrow(self, seen: int) -> None:
        """A node has seen version ``seen``; if it is later than ours, our files were lost.

        The policy in force gets a version beyond it. Raises: as `decide`.
        """

        def beyond(kept: Intent) -> Intent:
            if not kept.policy.version < seen < MAX_VERSION:
                return kept
            new = pb.Policy()
            new.CopyFrom(kept.policy)
            new.version = seen + 1
            return replace(kept, policy=new)

        if seen > self.policy.version:
            async with self._deciding:
                await self._put(beyond)

    async def _put(self, change: Callable[[Intent], Intent]) -> None:
        """Write down what ``change`` makes of the intent in force, then put it in force."""
        for _ in range(MAX_ATTEMPTS):
            intent = change(self._intent)
            if intent == self._intent:
                return
            if await self._store.write(POLICY, dump_intent(intent)):
                self._take(intent)
                return
            await self._refresh()  # an earlier attempt, thought to have failed, has not
        raise StoreUnavailableError(self._store.where, "the policy was changed again and again")

    def _take(self, intent: Intent) -> None:
        """Put in force what is written down; never an older version than before."""
        kept, new = self._intent, intent.policy
        if new.version < kept.policy.version:
            return
        self._intent = intent
        if new.version != kept.policy.version:
            self._metrics.policy_version.set(new.version)
            log.info("policy %r version %d in force (%s)", new.name, new.version, intent.source)
            self._wake()

    def retire(self) -> None:
        """We lead no more: all watches look whether they may go on."""
        self._wake()

    def _wake(self) -> None:
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()

    async def watch(self) -> AsyncGenerator[pb.Policy, None]:
        """The policy in force at once, again when it changes, and every `REPEAT_S`.

        Ends with `close`. Raises: QueueFullError beyond `MAX_WATCHERS`.
        """
        if self._watchers >= MAX_WATCHERS:
            raise QueueFullError("policy watchers", MAX_WATCHERS)
        self._watchers += 1
        self._metrics.watchers.set(self._watchers)
        try:
            while not self._closed:
                changed = self._changed
                yield self.policy
                try:
                    async with asyncio.timeout(REPEAT_S):
                        await changed.wait()
                except TimeoutError:
                    continue
        finally:
            self._watchers -= 1
            self._metrics.watchers.set(self._watchers)

    async def look_at_file(self, *, stable: bool = False) -> None:
        """Take the policy file over where it changed; a bad one is reported once."""
        path = self._file
        if path is None:
            return
        digest, parsed = await asyncio.to_thread(_read_policy, path)
        # Editors write in place: content counts when two looks in a row find it the same.
        settled, self._last_digest = stable or digest == self._last_digest, digest
        if not settled:
            return
        if isinstance(parsed, ConfigError):
            self._refuse(digest, str(parsed))
            return
        if digest != self._intent.file_digest:
            try:
                await self.decide(parsed, "file", file_digest=digest)
            except StoreUnavailableError as exc:
                self._refuse(digest, str(exc))
                return
        if self._problem:
            log.info("the policy file is in order again")
        self._problem, self._refused = "", ""
        self._metrics.policy_file_ok.set(1)

    def _refuse(self, digest: str, problem: str) -> None:
        self._metrics.policy_file_ok.set(0)
        if (digest, problem) == (self._refused, self._problem):
            return
        self._refused, self._problem = digest, problem
        self._metrics.policy_file_errors.inc()
        log.error("policy file refused, version %d stays: %s", self.policy.version, problem)

    def close(self) -> None:
        """End all watches."""
        self._closed = True
        self._wake()


def _read_policy(path: Path) -> tuple[str, pb.Policy | ConfigError]:
    """Digest of the content, and the policy or why it cannot be used."""
    try:
        raw = policies.read_policy_file(path)
    except ConfigError as exc:
        return "", exc
    digest = blake3(raw).hexdigest()
    try:
        return digest, policies.parse_policy(raw, str(path), path.stem)
    except ConfigError as exc:
        return digest, exc
