"""The few things asked of Redis, each with a deadline, behind a breaker.

A value is a whole blob under ``kvferry:`` and the name that files have, without the expiry:
that is Redis' own. Every value is checked by whoever reads it: Redis may be anybody's.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from kvferry.cluster.backoff import Breaker
from kvferry.cluster.blob_name import blob_name, parse_blob_name
from kvferry.cluster.redis.url import RedisUrl, parse_redis_url
from kvferry.errors import (
    BlobTooLargeError,
    ConfigError,
    FerryError,
    InvalidKeyError,
    StoreFullError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

PREFIX = "kvferry:"
MAX_VALUE_BYTES = 512 << 20  # Redis takes no more
PIPELINE = 256
SCAN_COUNT = 1000
BREAK_S = 5.0


@dataclass(frozen=True, slots=True)
class RedisInfo:
    """What a server, or all masters of a cluster, say of themselves."""

    keys: int = 0
    used_bytes: int = 0
    max_bytes: int = 0
    evicted: int = 0


def _name(key: BlobKey) -> str:
    return PREFIX + blob_name(key)


class RedisLink:
    """Connects when first used. Usable from one event loop.

    Raises in every call: StoreUnavailableError, also at once while the breaker is open;
    StoreTimeoutError.

    Attributes:
        url: as shown to people: without a password.
        counters: failures by reason.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 2.0,
        max_value_bytes: int = MAX_VALUE_BYTES,
        budget_bytes: int = 0,
    ) -> None:
        """``budget_bytes``: given to Redis as its ``maxmemory``, with ``allkeys-lru``, a
        cluster's masters sharing it; 0 leaves the servers as they are configured.

        Raises: ConfigError: no such address, or the extra is not installed.
        """
        parsed = parse_redis_url(url)
        self.url = str(parsed)
        self.counters: Counter[str] = Counter()
        self._parsed, self._timeout_s, self._budget = parsed, timeout_s, budget_bytes
        self._max = min(max_value_bytes, MAX_VALUE_BYTES)
        self._breaker = Breaker(most_s=BREAK_S)
        self._client: Any = _connect(parsed, timeout_s)
        self._prepared = False
        self._budget_refused = False

    @property
    def healthy(self) -> bool:
        """False: it has not answered lately."""
        return self._breaker.healthy

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def get(self, key: BlobKey) -> bytes | None:
        """What lies under a key, unchecked; None: nothing.

        Raises: BlobTooLargeError: more than any blob of ours; no more than that was read.
        """
        async with self._asking():
            found: bytes = await self._client.getrange(_name(key), 0, self._max)
        if len(found) > self._max:
            raise BlobTooLargeError("size", len(found), self._max)
        return found or None

    async def head(self, key: BlobKey, length: int) -> tuple[bytes, int, int]:
        """(first bytes, size of the whole, ms left to live or -1); size 0: nothing there."""
        async with self._asking():
            pipe = self._client.pipeline(transaction=False)
            name = _name(key)
            pipe.getrange(name, 0, length - 1)
            pipe.strlen(name)
            pipe.pttl(name)
            start, size, left = await pipe.execute()
        return start, size, left

    async def put(
        self, key: BlobKey, data: bytes | memoryview, ttl_s: int = 0, *, fresh: bool = False
    ) -> bool:
        """Write a value whole; ``fresh``: only where there is none. False: there was.

        Raises: BlobTooLargeError, StoreFullError (Redis may not evict).
        """
        if len(data) > self._max:
            raise BlobTooLargeError("size", len(data), self._max)
        async with self._asking():
            done = await self._client.set(_name(key), data, ex=ttl_s or None, nx=fresh)
        return bool(done)

    async def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which have a value, in the order asked."""
        return [bool(n) for n in await self._each(keys, "EXISTS")]

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many had a value."""
        return sum(await self._each(keys, "UNLINK"))

    async def _each(self, keys: Sequence[BlobKey], verb: str) -> list[int]:
        answers: list[int] = []
        for at in range(0, len(keys), PIPELINE):
            async with self._asking():
                pipe = self._client.pipeline(transaction=False)
                for key in keys[at : at + PIPELINE]:
                    pipe.execute_command(verb, _name(key))
                answers += await pipe.execute()
        return answers

    async def scan(self) -> AsyncIterator[BlobKey]:
        """All blobs' keys, of all masters; one may come twice while tables are resized."""
        names = self._client.scan_iter(match=f"{PREFIX}*", count=SCAN_COUNT)
        while True:
            async with self._asking():
                name = await anext(names, None)
            if name is None:
                return
            try:
                text = bytes(name).decode().removeprefix(PREFIX)
                yield parse_blob_name(text)[0]
            except (UnicodeDecodeError, InvalidKeyError):
                self.counters["foreign_keys"] += 1

    async def info(self) -> RedisInfo:
        """Sums over the server, or over all masters."""
        async with self._asking():
            if self._parsed.cluster:
                told = await self._client.info(target_nodes="primaries")
            else:
                told = await self._client.info()
        parts = list(told.values()) if all(isinstance(v, dict) for v in told.values()) else [told]
        return RedisInfo(
            keys=sum(d["keys"] for p in parts for n, d in p.items() if _is_db(n, d)),
            used_bytes=sum(int(p.get("used_memory", 0)) for p in parts),
            max_bytes=sum(int(p.get("maxmemory", 0)) for p in parts),
            evicted=sum(int(p.get("evicted_keys", 0)) for p in parts),
        )

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        if not self._breaker.allow():
            raise StoreUnavailableError(self.url, "it has not answered lately")
        before = _cancels()
        try:
            async with asyncio.timeout(self._timeout_s):
                if not self._prepared:
                    await self._prepare()
                yield
        except Exception as exc:
            _end_if_cancelled(before)
            error = _translated(self.url, exc)
            if error is None:
                raise
            self.counters[f"failed_{error.reason}"] += 1
            if isinstance(error, StoreUnavailableError):
                self._breaker.failed()
                self._prepared = False  # it may come back as another process
            else:
                self._breaker.succeeded()
            raise error from exc
        _end_if_cancelled(before)
        self._breaker.succeeded()

    async def _prepare(self) -> None:
        """Give the server its budget; one that may not be told so is used as it is."""
        from redis.exceptions import ResponseError

        client, share, where = self._client, self._budget, {}
        if self._parsed.cluster:
            await client.initialize()
            share //= max(1, len(client.get_primaries()))
            where = {"target_nodes": "primaries"}
        if self._budget and not self._budget_refused:
            try:
                await client.config_set("maxmemory", share, **where)
                await client.config_set("maxmemory-policy", "allkeys-lru", **where)
            except ResponseError as exc:
                self._budget_refused = True
                self.counters["budget_refused"] += 1
                log.warning("%s keeps its own memory limit: %s", self.url, exc)
        self._prepared = True


def _cancels() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _end_if_cancelled(before: int) -> None:
    """redis-py 8.1 loses the cancellation of a call now and then, and goes on: end it here."""
    if _cancels() > before:
        raise asyncio.CancelledError


def _is_db(name: str, value: object) -> bool:
    return name.startswith("db") and isinstance(value, dict) and "keys" in value


def _connect(url: RedisUrl, timeout_s: float) -> Any:
    try:
        from redis.asyncio import Redis, RedisCluster
        from redis.asyncio.cluster import ClusterNode
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as exc:
        allowed = "used where redis-py is installed: pip install 'kvferry[redis]'"
        raise ConfigError("redis", str(url), allowed) from exc
    options: dict[str, Any] = {
        "username": url.user or None,
        "password": url.password or None,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "ssl": url.tls,
        # A connection may have died while it lay idle; more tries are the breaker's affair.
        "retry": Retry(NoBackoff(), 1),
    }
    if url.cluster:
        return RedisCluster(startup_nodes=[ClusterNode(h, p) for h, p in url.hosts], **options)
    ((host, port),) = url.hosts
    return Redis(host=host, port=port, db=url.db, **options)


def _translated(where: str, exc: Exception) -> FerryError | None:
    """Our error for one of redis-py's; None: it is none of those."""
    from redis import exceptions as foreign

    if isinstance(exc, TimeoutError | foreign.TimeoutError):
        return StoreTimeoutError(where, "no answer within the deadline")
    if isinstance(exc, foreign.OutOfMemoryError):
        return StoreFullError(where, 0, 0)
    if isinstance(exc, foreign.RedisError | foreign.RedisClusterException | OSError):
        return StoreUnavailableError(where, str(exc)[:300])
    return None
