"""The shared store as a service: LocalStore behind gRPC, with its housekeeping."""

import asyncio
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry

from kvferry.cluster.backends import open_backend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.credentials import Credentials
from kvferry.cluster.discovery import announced
from kvferry.cluster.link_probe import link_service
from kvferry.cluster.metrics import FailureCounts, RepositoryCollector
from kvferry.cluster.server import start_server
from kvferry.cluster.service import Running
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.settings import StoreSettings


async def start_store(settings: StoreSettings, registry: CollectorRegistry) -> Running:
    """Open the store and serve it. Its metrics are added to ``registry``.

    Raises: ConfigError: an address or a backend that cannot be used.
    """
    credentials = await asyncio.to_thread(Credentials.of, settings)
    limits = StoreLimits(
        budget_bytes=settings.budget_bytes,
        reserve_bytes=settings.reserve_bytes,
        max_blob_bytes=settings.max_blob_bytes,
        staged_ttl_s=settings.staged_ttl_s,
    )
    store = await LocalStore.open(open_backend(settings.backend), limits)
    failures = FailureCounts()
    announcement = AsyncExitStack()
    async with AsyncExitStack() as undo:
        undo.push_async_callback(store.aclose)
        servicer = BlobStoreServicer(
            store, max_blob_bytes=settings.max_blob_bytes, on_failure=failures
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
    upkeep = asyncio.create_task(store.run_maintenance())

    async def stop() -> None:
        await announcement.aclose()
        upkeep.cancel()
        await asyncio.gather(upkeep, return_exceptions=True)
        await server.stop(settings.shutdown_timeout_s)
        await store.aclose()

    return Running(
        addresses=server.addresses,
        stop=stop,
        background=upkeep,
        info={"backend": settings.backend},
    )
