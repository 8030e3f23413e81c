"""Store, coordinator and node daemon in one process and one event loop."""

import asyncio
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvferry.cluster.coordinator import Coordinator
from kvferry.cluster.coordinator_service import start_coordinator
from kvferry.cluster.service import Running
from kvferry.cluster.store_service import start_store
from kvferry.node.daemon import start_node
from kvferry.settings import CoordinatorSettings, NodeSettings, StoreSettings


async def start_together(
    data_dir: Path | None, socket: Path | None, policy_file: Path | None
) -> Running:
    """Start all three on their configured addresses; with ``data_dir`` on free ports there.

    They are stopped the other way round: the node first, so that it still uploads.
    Raises: ConfigError: an address or folder that cannot be used.
    """
    registry = CollectorRegistry()
    own = None if data_dir is None else Path.cwd() / data_dir
    listen = None if own is None else "127.0.0.1:0"
    parts: list[Running] = []
    try:
        backend = None if own is None else f"file://{own / 'store'}"
        parts.append(
            await start_store(StoreSettings.load(listen=listen, backend=backend), registry)
        )
        settings = CoordinatorSettings.load(
            listen=listen,
            policy_file=policy_file,
            data_dir=None if own is None else own / "coordinator",
        )
        parts.append(await start_coordinator(await Coordinator.open(settings), settings))
        node = NodeSettings.load(
            listen=listen,
            socket=socket,
            store=parts[0].addresses[0],
            coordinator=parts[1].addresses[0],
            data_dir=None if own is None else own / "node",
        )
        parts.append(await start_node(node, registry))
    except BaseException:
        await _stop(parts)
        raise

    async def background() -> None:
        running = [part.background for part in parts if part.background is not None]
        await asyncio.gather(*running)

    watched = asyncio.create_task(background())

    async def stop() -> None:
        watched.cancel()
        await asyncio.gather(watched, return_exceptions=True)
        await _stop(parts)

    return Running(
        addresses=[f"unix:{node.socket}", *(part.addresses[0] for part in parts)],
        stop=stop,
        background=watched,
        info={"socket": str(node.socket)},
    )


async def _stop(parts: list[Running]) -> None:
    while parts:
        await parts.pop().stop()
