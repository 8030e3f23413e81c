"""``kvferry drain``: have a node hand over what only it has, before it is switched off."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.output import JsonOption, progress, write_json

if TYPE_CHECKING:
    from kvferry.cluster.coordinator_client import CoordinatorClient
    from kvferry.proto.v1 import coordinator_pb2 as pb

LOOK_S = 0.5


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(drain)


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="As `kvferry status` names it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Have it take blobs again.")] = False,
    wait: Annotated[bool, typer.Option(help="Return when it is done.")] = True,
    timeout_s: Annotated[float, typer.Option(min=1, help="Wait no longer.")] = 600.0,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The node's if left out.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Have a node take no new blobs and hand over those that nobody else has.

    It still serves what it holds. Starting its daemon again, or --undo, ends it. Exit code 1:
    it was not done in time (it goes on).
    """
    from kvferry.errors import ConfigError
    from kvferry.settings import NodeSettings

    where = coordinator or NodeSettings.load().coordinator
    if not where:
        raise ConfigError("coordinator", where, "HOST:PORT of a coordinator (--coordinator)")
    found = asyncio.run(_drain(where, node, undo, timeout_s if wait else 0.0))
    done = found.drained or undo
    if json:
        write_json({"node_id": node, "state": found.state, "drained": found.drained}, json)
    if json != "-":
        typer.echo(f"{node}: {'drained' if found.drained else found.state}")
    if wait and not done:
        raise typer.Exit(1)


async def _drain(where: str, node: str, undo: bool, timeout_s: float) -> "pb.DrainReply":
    from kvferry.cli.blob_source import credentials
    from kvferry.cluster.coordinator_client import CoordinatorClient

    async with CoordinatorClient(where, credentials=credentials()) as client:
        found = await client.drain(node, undo=undo)
        if undo:
            return found
        end = time.monotonic() + timeout_s
        with progress(f"draining {node}", 1.0) as bar:
            while not found.drained and time.monotonic() < end:
                await asyncio.sleep(LOOK_S)
                found = await _look(client, node, found)
                bar.update(float(found.drained), found.state)
        return found


async def _look(client: "CoordinatorClient", node: str, before: "pb.DrainReply") -> "pb.DrainReply":
    """How it stands; the order is given again where a coordinator has forgotten it."""
    from kvferry.errors import ConfigError, StoreUnavailableError

    try:
        return await client.drain(node)
    except (StoreUnavailableError, ConfigError):  # started again, the node comes back
        return before
