"""``kvferry prune``: delete what nobody wants any more, or what one prompt left behind."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.cli.pin import StoreOption
from kvferry.cli.quota import CoordinatorOption

if TYPE_CHECKING:
    from kvferry.cli.chain import Chain
    from kvferry.cli.prune_work import Doomed, Filters

_MODEL_HELP = (
    "Only this model's: its id, or how it begins (hex). With --text or --tokens: smollm2, a "
    "folder, a hub id, or for token ids the whole model id."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(prune)


def prune(
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stored longer ago than 12h, 7d, ...")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option(metavar="TIME", help="Not used for 12h, 7d, ...")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of this namespace, by name or tag.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of exactly this prompt; -: stdin.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of exactly these token ids (JSON).")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is what a user says to a chat model.")
    ] = False,
    with_prefix: Annotated[
        bool, typer.Option("--with-prefix", help="A prompt's pages too that others begin with.")
    ] = False,
    calibrations: Annotated[
        bool, typer.Option("--calibrations", help="These too; what needs them is lost with them.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="No filter: all of it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreOption = None,
    coordinator: CoordinatorOption = None,
    socket: Annotated[Path | None, typer.Option(help="Unix socket of this machine's node.")] = None,
    json: JsonOption = None,
) -> None:
    """Delete blobs from the store, and from this machine's node where one runs.

    Filters must all fit. A prompt (--text, --tokens) loses its tails, states and pages, from
    the last one back to the first that something else hangs on. Other nodes keep copies until
    they evict them; nobody is told of them.
    """
    import asyncio

    from kvferry.cli.clients import store_address
    from kvferry.errors import ConfigError

    address = store_address(store)
    chain, left = None, 0
    if text is not None or tokens is not None:
        if any((older_than, unused_for, namespace, everything, calibrations)):
            raise ConfigError("--text or --tokens", text or tokens, "given without other filters")
        chain = _chain(text, tokens, model, chat, socket)
        found, left = asyncio.run(_of_chain(address, chain, with_prefix))
    else:
        if with_prefix or chat:
            raise ConfigError("--with-prefix and --chat", "", "given with --text or --tokens")
        filters = _filters(model, older_than, unused_for, namespace, calibrations, coordinator)
        if not (everything or any((model, older_than, unused_for, namespace))):
            raise ConfigError("filter", "", "given: --model, --older-than, ...; or --all")
        found = asyncio.run(_fitting(address, filters))
    deleted = 0
    if found.keys and not dry_run:
        if json != "-":
            _say(found, "to be deleted")
        if not yes:
            _confirm()
        deleted = asyncio.run(_delete(address, socket, found))
    if json:
        kinds = {kind: {"blobs": n, "bytes": size} for kind, (n, size) in found.kinds.items()}
        value = {"blobs": len(found.keys), "bytes": found.bytes, "kinds": kinds}
        write_json(value | {"dry_run": dry_run, "deleted": deleted}, json)
    if json != "-":
        if dry_run or not found.keys:
            _say(found, "would be deleted")
        else:
            typer.echo(f"{deleted:,} blobs deleted")
        if left:
            typer.echo(
                f"{left:,} blobs of this prompt's pages stay: others begin with them, or it "
                "went on (--with-prefix takes these too)"
            )


def _chain(
    text: str | None, tokens: str | None, model: str | None, chat: bool, socket: Path | None
) -> "Chain":
    from kvferry.cli.chain import chain_of_prompt
    from kvferry.errors import ConfigError

    if text is not None and tokens is not None:
        raise ConfigError("--text and --tokens", f"{text}, {tokens}", "one of the two")
    prompt = text if text is not None else tokens
    return chain_of_prompt(prompt or "", model or "smollm2", chat=chat, socket=socket)


def _filters(
    model: str | None,
    older_than: str | None,
    unused_for: str | None,
    namespace: str | None,
    calibrations: bool,
    coordinator: str | None,
) -> "Filters":
    from kvferry.cli.durations import seconds
    from kvferry.cli.prune_work import Filters
    from kvferry.cli.quota import tag_of
    from kvferry.errors import ConfigError

    now, prefix = time.time(), model or ""
    if not all(c in "0123456789abcdef" for c in prefix) or len(prefix) > 64:
        raise ConfigError("--model", prefix, "hex digits of a model id (`kvferry explain`)")
    return Filters(
        model=prefix,
        stored_before=now - seconds("--older-than", older_than) if older_than else 0.0,
        used_before=now - seconds("--unused-for", unused_for) if unused_for else 0.0,
        namespace_tag=tag_of(namespace, coordinator) if namespace else 0,
        calibrations=calibrations,
    )


async def _fitting(address: str, filters: "Filters") -> "Doomed":
    from kvferry.cli.clients import store_client
    from kvferry.cli.prune_work import pick

    async with store_client(address, timeout_s=600.0) as client:
        return await pick(client, filters)


async def _of_chain(address: str, chain: "Chain", with_prefix: bool) -> "tuple[Doomed, int]":
    """What goes, and how many of its blobs stay."""
    from kvferry.cli.chain import find, leaf_first
    from kvferry.cli.clients import store_client
    from kvferry.cli.prune_work import doomed

    async with store_client(address, timeout_s=600.0) as client:
        found = await find(client, chain)
        going = await leaf_first(client, found, with_prefix=with_prefix)
        left = len(found.blobs) - len(going)
        return doomed((info.key, info.size) for info in going), left


async def _delete(address: str, socket: Path | None, found: "Doomed") -> int:
    from contextlib import AsyncExitStack

    from kvferry.cli.clients import store_client
    from kvferry.cli.prune_work import delete
    from kvferry.settings import NodeSettings

    node = NodeSettings.load(socket=socket).socket
    places = [address, *([f"unix:{node}"] if node.is_socket() else [])]
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(store_client(place, timeout_s=120.0))
            for place in places
        ]
        with progress("deleting", len(found.keys)) as bar:
            return await delete(clients, found.keys, lambda done: bar.update(done))


def _say(found: "Doomed", what: str) -> None:
    from kvferry.cli.blob_screen import mib

    for kind, (count, size) in found.kinds.items():
        typer.echo(f"{kind:12} {count:>10,} blobs {mib(size):>16}")
    typer.echo(f"{len(found.keys):,} blobs, {mib(found.bytes)} {what}")


def _confirm() -> None:
    from kvferry.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError("--yes", "", "given where nobody can be asked")
    if not typer.confirm("Delete them?"):
        typer.echo("nothing is deleted")
        raise typer.Exit(1)
