"""``kvferry status``: what runs here, what it holds, who is there."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.cli import status_leaders
from kvferry.cli.output import JsonOption, write_json
from kvferry.cli.status_screen import print_status

if TYPE_CHECKING:
    from kvferry.proto.v1 import coordinator_pb2 as pb

if TYPE_CHECKING:
    from kvferry.cluster.credentials import Credentials

Answer = dict[str, Any]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(status)


def status(
    socket: Annotated[Path | None, typer.Option(help="Unix socket of this machine's node.")] = None,
    store: Annotated[str | None, typer.Option(help="HOST:PORT of the store.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT[,...] of the coordinators.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, max=60, help="Wait so long.")] = 3.0,
    json: JsonOption = None,
) -> None:
    """Ask node, store and coordinator how they are; each may be down.

    Addresses come from the settings of the node. Exit code 1: none of them answers.
    """
    from kvferry.cluster.credentials import Credentials
    from kvferry.settings import NodeSettings

    settings = NodeSettings.load(socket=socket, store=store, coordinator=coordinator)
    shown = Credentials.of(settings)
    found = {
        "node": _answer(f"unix:{settings.socket}", lambda: _node(settings.socket, timeout_s)),
        "store": _answer(settings.store, lambda: _store(settings.store, timeout_s, shown)),
        "coordinator": _answer(
            settings.coordinator,
            lambda: _coordinator(settings.coordinator, timeout_s, shown),
        ),
    }
    if json:
        write_json(found, json)
    if json != "-":
        print_status(found)
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
        found = client.status()
    message = MessageToDict(
        found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    message["phase"] = message["phase"].removeprefix("NODE_PHASE_").lower()
    message["links"] = [_link(link) for link in found.links]
    message["exo"] = _exo(found.exo)
    return _plain(message)


def _store(address: str, timeout_s: float, credentials: "Credentials") -> Answer:
    from dataclasses import asdict

    from kvferry.cluster.sync_client import SyncBlobStoreClient

    with SyncBlobStoreClient(address, timeout_s=timeout_s, credentials=credentials) as client:
        found = asdict(client.stat())
    for use in found["namespaces"]:
        use["tag"] = f"{use['tag']:016x}"
    for lease in found["leases"]:
        lease["model_id"] = lease["model_id"].hex()
    return found


def _coordinator(address: str, timeout_s: float, credentials: "Credentials") -> Answer:
    import asyncio

    from kvferry.cluster.coordinator_client import CoordinatorClient

    async def ask() -> Answer:
        async with CoordinatorClient(
            address, timeout_s=timeout_s, credentials=credentials
        ) as client:
            coordinators = status_leaders.roles(await client.leadership())
            if not status_leaders.somebody_leads(coordinators):
                return status_leaders.leaderless(coordinators)
            members, explained = await client.members(), await client.explain(0)
        return {
            "coordinators": coordinators,
            "term": members.term,
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
                    "drained": member.drained,
                    "links": [_link(link) for link in member.last.links],
                    "exo": _exo(member.last.exo),
                }
                for member in members.members
            ],
        }

    return asyncio.run(ask())


def _link(link: "pb.LinkSample") -> Answer:
    return {
        "to": link.to,
        "kind": link.kind,
        "bytes_per_s": link.bytes_per_s,
        "latency_s": link.latency_s,
        "age_s": round(link.age_s, 1),
        "probed": link.probed,
    }


def _exo(exo: "pb.ExoState") -> Answer | None:
    """What exo says on one machine; None: it does not run there."""
    from google.protobuf.json_format import MessageToDict

    if not exo.reachable:
        return None
    found: Answer = MessageToDict(
        exo, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for node in found["nodes"]:
        node |= {name: int(size) for name, size in node.items() if name.endswith("_bytes")}
    return found


def _plain(message: Answer) -> Answer:
    """64-bit numbers, which protobuf's JSON has as text, as numbers again."""
    for name in ("incarnation", "uploads_pending_bytes", "policy_version", "resident_bytes"):
        message[name] = int(message[name])
    message["counters"] = {k: int(v) for k, v in message["counters"].items()}
    message["tiers"] = [
        {name: value if name == "name" else int(value) for name, value in tier.items()}
        for tier in message["tiers"]
    ]
    if "disk_writes" in message:
        message["disk_writes"] = {k: float(v) for k, v in message["disk_writes"].items()}
    return message
