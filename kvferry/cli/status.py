"""``kvferry status``: what runs here, what it holds, who is there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli.output import JsonOption, write_json

Answer = dict[str, Any]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(status)


def status(
    socket: Annotated[Path | None, typer.Option(help="Unix socket of this machine's node.")] = None,
    store: Annotated[str | None, typer.Option(help="HOST:PORT of the store.")] = None,
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of the coordinator.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, max=60, help="Wait so long.")] = 3.0,
    json: JsonOption = None,
) -> None:
    """Ask node, store and coordinator how they are; each may be down.

    Addresses come from the settings of the node. Exit code 1: none of them answers.
    """
    from kvferry.settings import NodeSettings

    settings = NodeSettings.load(socket=socket, store=store, coordinator=coordinator)
    found = {
        "node": _answer(f"unix:{settings.socket}", lambda: _node(settings.socket, timeout_s)),
        "store": _answer(settings.store, lambda: _store(settings.store, timeout_s)),
        "coordinator": _answer(
            settings.coordinator, lambda: _coordinator(settings.coordinator, timeout_s)
        ),
    }
    if json:
        write_json(found, json)
    if json != "-":
        _print(found)
    if not any(answer["up"] for answer in found.values()):
        raise typer.Exit(1)


def _answer(address: str, ask: Callable[[], Answer]) -> Answer:
    """What a service said, or in ``problem`` why there is nothing."""
    from kvferry.errors import FerryError

    if not address:
        return {"up": False, "address": "", "problem": "none configured"}
    try:
        return {"up": True, "address": address, **ask()}
    except FerryError as exc:
        return {"up": False, "address": address, "problem": str(exc)}


def _node(socket: Path, timeout_s: float) -> Answer:
    from google.protobuf.json_format import MessageToDict

    from kvferry.node.client import NodeClient

    with NodeClient(socket, timeout_s=timeout_s) as client:
        return _plain(
            MessageToDict(
                client.status(),
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
        )


def _store(address: str, timeout_s: float) -> Answer:
    from dataclasses import asdict

    from kvferry.cluster.sync_client import SyncBlobStoreClient

    with SyncBlobStoreClient(address, timeout_s=timeout_s) as client:
        return asdict(client.stat())


def _coordinator(address: str, timeout_s: float) -> Answer:
    import asyncio

    from kvferry.cluster.coordinator_client import CoordinatorClient

    async def ask() -> Answer:
        async with CoordinatorClient(address, timeout_s=timeout_s) as client:
            members, explained = await client.members(), await client.explain(0)
        return {
            "policy_name": explained.policy.name,
            "policy_version": members.policy_version,
            "members": [
                {
                    "node_id": member.node_id,
                    "state": member.state,
                    "address": member.address,
                    "version": member.version,
                    "seconds_since_heartbeat": round(member.seconds_since_heartbeat, 1),
                    "memory_used_share": round(member.last.memory_used_share, 3),
                    "free_disk_bytes": member.last.free_disk_bytes,
                    "layers": [[s.layer_start, s.layer_end] for s in member.last.shards],
                }
                for member in members.members
            ],
        }

    return asyncio.run(ask())


def _plain(message: Answer) -> Answer:
    """64-bit numbers, which protobuf's JSON has as text, as numbers again."""
    for name in ("incarnation", "uploads_pending_bytes", "policy_version", "resident_bytes"):
        message[name] = int(message[name])
    message["counters"] = {k: int(v) for k, v in message["counters"].items()}
    message["tiers"] = [
        {name: value if name == "name" else int(value) for name, value in tier.items()}
        for tier in message["tiers"]
    ]
    return message


def _print(found: Mapping[str, Answer]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kvferry", title_justify="left", show_lines=True)
    for name in ("service", "address", "state"):
        table.add_column(name, overflow="fold")
    words = {"node": _node_words, "store": _store_words, "coordinator": _coordinator_words}
    for name, answer in found.items():
        said = words[name](answer) if answer["up"] else [f"down: {_short(answer['problem'])}"]
        table.add_row(name, answer["address"] or "-", "\n".join(said))
    Console().print(table)


def _short(problem: str) -> str:
    """The end of a transport's message says why; ``--json`` has all of it."""
    return problem.rpartition(": ")[2] if "cannot be reached" in problem else problem


def _node_words(a: Answer) -> list[str]:
    tiers = [
        f"{t['name']}: {t['blobs']:,} blobs, {_size(t['bytes'])} of {_size(t['budget_bytes'])}"
        for t in a["tiers"]
    ]
    store = "answers" if a["store_reachable"] else "not reachable from here"
    link = "answers" if a["coordinator_reachable"] else "not reachable from here"
    peers = ", ".join(p["node_id"] for p in a["peers"]) or "none"
    return [
        f"{a['node_id']}, version {a['version']}, {_size(a['resident_bytes'])} resident",
        *tiers,
        f"waiting for upload: {a['uploads_pending']:,} blobs, {_size(a['uploads_pending_bytes'])}",
        f"store {store}, coordinator {link}; peers: {peers}",
        f"policy {a['policy_name']!r}, version {a['policy_version']}",
        *_trouble(a["counters"]),
    ]


def _store_words(a: Answer) -> list[str]:
    return [
        f"{a['blobs']:,} blobs, {_size(a['bytes'])} of {_size(a['budget_bytes'])}",
        f"in {a['backend']}",
        f"{a['pages_complete']:,} complete pages, {a['pinned']:,} blobs under a lease, "
        f"{a['quarantined']:,} damaged and set aside",
        f"{_size(a['free_disk_bytes'])} free on its disk",
        *_trouble(a["counters"]),
    ]


def _coordinator_words(a: Answer) -> list[str]:
    members = [
        f"{m['node_id']}: {m['state']}, heard of {m['seconds_since_heartbeat']:.0f} s ago"
        for m in a["members"]
    ]
    return [
        f"policy {a['policy_name']!r}, version {a['policy_version']}",
        *(members or ["no members"]),
    ]


_TROUBLE = ("drop_", "upload_refused_", "upload_lost_", "corrupt", "hook_miss_", "quarantined")


def _trouble(counters: Mapping[str, int]) -> list[str]:
    """What went wrong since the start, by reason; nothing: no line."""
    bad = [f"{n} {c:,}" for n, c in sorted(counters.items()) if c and n.startswith(_TROUBLE)]
    return [f"since its start: {', '.join(bad)}"] if bad else []


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
