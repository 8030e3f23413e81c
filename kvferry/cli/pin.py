"""``kvferry pin`` and ``kvferry unpin``: leases that keep a prompt from being evicted."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.options import ModelOption
from kvferry.cli.output import JsonOption, write_json

if TYPE_CHECKING:
    from kvferry.cli.chain import Chain
    from kvferry.cluster.client import BlobStoreClient
    from kvferry.proto.keys import BlobKey

StoreOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Default: the settings' store.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(pin)
    app.command()(unpin)


def pin(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Text, or JSON with token ids or messages; -: stdin."),
    ] = None,
    page_key: Annotated[
        str | None, typer.Option(metavar="HEX", help="Pages up to this one, instead of a prompt.")
    ] = None,
    model: ModelOption = "smollm2",
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is what a user says to a chat model.")
    ] = False,
    ttl: Annotated[str, typer.Option(help="How long: 15m, 12h, 7d; at most 30d.")] = "1d",
    store: StoreOption = None,
    socket: Annotated[Path | None, typer.Option(help="Unix socket of this machine's node.")] = None,
    json: JsonOption = None,
) -> None:
    """Keep a prompt's blobs in the store, whatever else is evicted, until the lease ends.

    `kvferry status` lists leases. Deleting and damage end a blob all the same. Exit code 1:
    nothing of the prompt is stored.
    """
    import asyncio

    from kvferry.cli.chain import chain_of_prompt
    from kvferry.cli.clients import store_address
    from kvferry.cli.durations import seconds
    from kvferry.cluster.convert import MAX_LEASE_S
    from kvferry.errors import ConfigError

    if (prompt is None) == (page_key is None):
        raise ConfigError("FILE and --page-key", prompt or page_key, "one of the two")
    ttl_s = seconds("--ttl", ttl)
    if ttl_s > MAX_LEASE_S:
        allowed = f"at most {MAX_LEASE_S // 86_400}d: pin again before its end"
        raise ConfigError("--ttl", ttl, allowed)
    address = store_address(store)
    if page_key is not None:
        found = asyncio.run(_pin_page(address, digest_of(page_key), ttl_s))
    else:
        chain = chain_of_prompt(prompt or "", model, chat=chat, socket=socket)
        found = asyncio.run(_pin_chain(address, chain, ttl_s))
    leases, pinned, size = found
    until = int(time.time()) + ttl_s
    if json:
        value = {"leases": leases, "blobs": pinned, "bytes": size, "until_unix_s": until}
        write_json(value, json)
    if json != "-":
        _say(leases, pinned, size, until)
    if not pinned:
        raise typer.Exit(1)


def _say(leases: list[str], pinned: int, size: int, until: int) -> None:
    from kvferry.cli.blob_screen import mib

    if not pinned:
        typer.echo("nothing of this prompt is in the store: no lease was made")
        return
    ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(until))
    typer.echo(f"{pinned:,} blobs ({mib(size)}) are kept until {ends}; to end that sooner:")
    for lease in leases:
        typer.echo(f"  kvferry unpin {lease}")


def digest_of(text: str) -> bytes:
    """A page key. Raises: ConfigError."""
    from kvferry.cli.chain import MODEL_ID
    from kvferry.errors import ConfigError

    if not MODEL_ID.fullmatch(text):
        raise ConfigError("--page-key", text[:80], "64 hex digits (`kvferry explain` shows them)")
    return bytes.fromhex(text)


async def _pin_page(address: str, page_key: bytes, ttl_s: int) -> tuple[list[str], int, int]:
    from kvferry.cli.chain import chain_of_page
    from kvferry.cli.clients import store_client

    async with store_client(address) as client:
        return await _lease(client, await chain_of_page(client, page_key), ttl_s)


async def _pin_chain(address: str, chain: "Chain", ttl_s: int) -> tuple[list[str], int, int]:
    from kvferry.cli.clients import store_client

    async with store_client(address) as client:
        return await _lease(client, chain, ttl_s)


async def _lease(
    client: "BlobStoreClient", chain: "Chain", ttl_s: int
) -> tuple[list[str], int, int]:
    """(leases, blobs, bytes): as many leases as the keys of one call make necessary."""
    from kvferry.cli.chain import calibrations_of, find
    from kvferry.cluster.convert import MAX_KEYS

    blobs = (await find(client, chain)).blobs
    keys: list[BlobKey] = [info.key for info in blobs]
    if keys:
        keys += calibrations_of(blobs)
    leases, pinned = [], 0
    for at in range(0, len(keys), MAX_KEYS):
        lease, held = await client.pin(keys[at : at + MAX_KEYS], ttl_s)
        leases.append(lease)
        pinned += held
    return leases, pinned, sum(info.size for info in blobs)


def unpin(
    lease: Annotated[str, typer.Argument(metavar="LEASE", help="As `kvferry pin` said it.")],
    store: StoreOption = None,
    json: JsonOption = None,
) -> None:
    """End a lease before its time. Exit code 1: there is none of this name (any more)."""
    import asyncio

    from kvferry.cli.clients import store_address, store_client

    address = store_address(store)

    async def end() -> bool:
        async with store_client(address) as client:
            return await client.unpin(lease)

    existed = asyncio.run(end())
    if json:
        write_json({"lease": lease, "existed": existed}, json)
    if json != "-":
        typer.echo("the lease has ended" if existed else "there is no such lease (any more)")
    if not existed:
        raise typer.Exit(1)
