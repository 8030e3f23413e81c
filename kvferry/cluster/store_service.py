"""The shared store as a service: a repository behind gRPC, with its housekeeping."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

from blake3 import blake3
from prometheus_client import CollectorRegistry

from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.bucket.open import is_bucket
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.credentials import Credentials
from kvferry.cluster.discovery import announced
from kvferry.cluster.election.turn import ElectedTurn
from kvferry.cluster.link_probe import link_service
from kvferry.cluster.mend import RemoteReplica
from kvferry.cluster.metrics import FailureCounts, RepositoryCollector
from kvferry.cluster.open_store import open_store
from kvferry.cluster.redis.hot import HotOptions, HotStore
from kvferry.cluster.redis.link import RedisLink
from kvferry.cluster.scrubber import Scrubber
from kvferry.cluster.served import ServedStore
from kvferry.cluster.server import start_server
from kvferry.cluster.service import Running
from kvferry.cluster.store import StoreLimits
from kvferry.errors import ConfigError
from kvferry.settings import StoreSettings


async def start_store(settings: StoreSettings, registry: CollectorRegistry) -> Running:
    """Open the store and serve it. Its metrics are added to ``registry``.

    Raises: ConfigError: an address or a backend that cannot be used.
    """
    credentials = await asyncio.to_thread(Credentials.of, settings)
    failures = FailureCounts()
    announcement, opened = AsyncExitStack(), AsyncExitStack()
    async with AsyncExitStack() as undo:
        undo.push_async_callback(opened.aclose)
        store = await open_served(settings)
        opened.push_async_callback(store.aclose)
        replicas = []
        for address in settings.replicas:
            client = BlobStoreClient(
                address, max_blob_bytes=settings.max_blob_bytes, credentials=credentials
            )
            opened.push_async_callback(client.aclose)
            replicas.append(RemoteReplica(client))
        servicer = BlobStoreServicer(
            store,
            max_blob_bytes=settings.max_blob_bytes,
            on_failure=failures,
            replicas=replicas,
        )
        server = await start_server(
            [blob_store_service(servicer), link_service(failures)],
            [settings.listen],
            credentials=credentials,
            allow_remote_plaintext=settings.allow_remote_plaintext,
            on_refused=failures,
        )
        undo.push_async_callback(server.stop, 0.5)
        await announcement.enter_async_context(
            announced(settings.discovery, "store", server.addresses[0])
        )
        undo.pop_all()
    registry.register(RepositoryCollector("kvferry_store", store.stat_now, failures))
    duties: list[Callable[[], Awaitable[None]]] = [store.run_maintenance]
    if settings.scrub_bytes_per_s:
        duties.append(Scrubber(store, settings.scrub_bytes_per_s, replicas, registry).run)
    upkeep = asyncio.create_task(_all(duties))

    async def stop() -> None:
        await announcement.aclose()
        upkeep.cancel()
        await asyncio.gather(upkeep, return_exceptions=True)
        await server.stop(settings.shutdown_timeout_s)
        await opened.aclose()

    return Running(
        addresses=server.addresses,
        stop=stop,
        background=upkeep,
        info={"backend": settings.backend},
    )


async def _all(duties: Sequence[Callable[[], Awaitable[None]]]) -> None:
    await asyncio.gather(*(duty() for duty in duties))


async def open_served(settings: StoreSettings) -> ServedStore:
    """The store's backend, behind its hot tier where it has one.

    Raises: ConfigError: one that cannot be used, or is no backend of a store.
    """
    limits = StoreLimits(
        budget_bytes=settings.budget_bytes,
        reserve_bytes=settings.reserve_bytes,
        max_blob_bytes=settings.max_blob_bytes,
        staged_ttl_s=settings.staged_ttl_s,
        max_age_s=settings.max_age_s,
        sweep_s=settings.sweep_s,
    )
    link = None
    if settings.hot:
        link = RedisLink(
            settings.hot,
            timeout_s=settings.hot_timeout_s,
            max_value_bytes=settings.hot_value_bytes,
            budget_bytes=settings.hot_bytes,
        )
    turn = None
    if settings.etcd and is_bucket(settings.backend):
        office = f"sweeper-{blake3(settings.backend.encode()).hexdigest()[:16]}"
        turn = await ElectedTurn.open(settings, office, settings.listen)
    backend = await open_store(settings.backend, limits, turn=turn)
    if not isinstance(backend, ServedStore):
        await backend.aclose()
        allowed = "file:///PATH or s3://BUCKET; redis:// goes before one of them as `hot`"
        raise ConfigError("backend", settings.backend, allowed)
    if link is None:
        return backend
    options = HotOptions(
        max_value_bytes=settings.hot_value_bytes,
        ttl_s=settings.hot_ttl_s,
        on_read=settings.hot_fill in ("read", "both"),
        on_put=settings.hot_fill in ("put", "both"),
    )
    return HotStore(backend, link, options)
