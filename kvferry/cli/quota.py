"""``kvferry quota``: how much a namespace may hold in the store."""

import re
from typing import Annotated

import typer

from kvferry.cli.output import JsonOption, write_json
from kvferry.cli.pin import StoreOption

CoordinatorOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Knows namespaces by name.")
]
_TAG = re.compile(r"[0-9a-f]{16}")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    quota = typer.Typer(help="How much a namespace may hold.", no_args_is_help=True)
    quota.command()(show)
    quota.command(name="set")(set_quota)
    app.add_typer(quota, name="quota")


def show(
    store: StoreOption = None, coordinator: CoordinatorOption = None, json: JsonOption = None
) -> None:
    """Show what each namespace holds, and its quota."""
    from kvferry.cli.clients import store_address, sync_store_client
    from kvferry.errors import FerryError

    with sync_store_client(store_address(store), timeout_s=10.0) as client:
        uses = client.stat().namespaces
    try:
        names = {tag: name for name, tag in _names(coordinator).items()}
    except FerryError:
        names = {}
    rows = [
        {
            "namespace": names.get(use.tag) or use.name,
            "tag": f"{use.tag:016x}",
            "blobs": use.blobs,
            "bytes": use.bytes,
            "quota_bytes": use.quota_bytes,
            "counters": dict(use.counters),
        }
        for use in uses
    ]
    if json:
        write_json({"namespaces": rows}, json)
    if json != "-":
        if not rows:
            typer.echo("no namespace holds anything yet, and none has a quota")
            return
        _print(rows)


def _print(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from kvferry.cli.blob_screen import mib

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("namespace", "tag"):
        table.add_column(name)
    for name in ("blobs", "holds", "quota", "evicted"):
        table.add_column(name, justify="right")
    for row in rows:
        counters = row["counters"]
        evicted = counters.get("evicted", 0) if isinstance(counters, dict) else 0
        none = row["tag"] == f"{0:016x}"
        table.add_row(
            "(of nobody)" if none else str(row["namespace"] or "?"),
            "" if none else str(row["tag"]),
            f"{row['blobs']:,}",
            mib(float(str(row["bytes"]))),
            mib(float(str(row["quota_bytes"]))) if row["quota_bytes"] else "none",
            f"{evicted:,}",
        )
    Console().print(table)


def set_quota(
    namespace: Annotated[
        str, typer.Argument(metavar="NAME", help="As the coordinator knows it; or its tag.")
    ],
    quota: Annotated[str, typer.Argument(metavar="BYTES", help="500MB, 10GiB; none: no quota.")],
    store: StoreOption = None,
    coordinator: CoordinatorOption = None,
    json: JsonOption = None,
) -> None:
    """Set how much a namespace may hold. The store keeps it, also over restarts.

    A namespace beyond its quota loses what it has used least recently, and never what belongs
    to another; over a bucket, when it is next swept. Bytes are those of the store's medium.
    """
    from kvferry.cli.clients import store_address, sync_store_client
    from kvferry.cli.durations import size
    from kvferry.errors import ConfigError

    quota_bytes = 0 if quota == "none" else size("BYTES", quota)
    if not quota_bytes and quota != "none":
        raise ConfigError("BYTES", quota, "above 0, or none")
    tag = tag_of(namespace, coordinator)
    with sync_store_client(store_address(store), timeout_s=60.0) as client:
        evicted = client.set_quota(tag, namespace, quota_bytes)
    if json:
        value = {"namespace": namespace, "tag": f"{tag:016x}", "quota_bytes": quota_bytes}
        write_json(value | {"evicted": evicted}, json)
    if json != "-":
        went = f"; {evicted:,} blobs went for it" if evicted else ""
        typer.echo(
            f"{namespace} may hold {quota if quota_bytes else 'what there is room for'}{went}"
        )


def tag_of(namespace: str, coordinator: str | None) -> int:
    """The tag of a namespace by its name. Raises: ConfigError, StoreUnavailableError."""
    from kvferry.errors import ConfigError

    if _TAG.fullmatch(namespace) and int(namespace, 16):
        return int(namespace, 16)
    known = _names(coordinator, namespace)
    if namespace not in known:
        raise ConfigError("namespace", namespace, f"one of {', '.join(sorted(known))}, or a tag")
    return known[namespace]


def _names(coordinator: str | None, name: str = "") -> dict[str, int]:
    import asyncio

    from kvferry.cli.clients import coordinator_client
    from kvferry.errors import ConfigError
    from kvferry.settings import NodeSettings

    address = NodeSettings.load(coordinator=coordinator).coordinator
    if not address:
        raise ConfigError("--coordinator", "", "HOST:PORT: it knows namespaces by their names")

    async def ask() -> dict[str, int]:
        async with coordinator_client(address) as client:
            return await client.namespaces(name)

    return asyncio.run(ask())
