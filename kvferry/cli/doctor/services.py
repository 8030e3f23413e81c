"""Node, store and coordinator: do they answer, and fit each other?"""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from kvferry import __version__
from kvferry.cli.doctor.finding import FAIL, OK, WARN, Finding, size
from kvferry.cli.doctor.software import has_mlx
from kvferry.cluster.credentials import Credentials
from kvferry.errors import FerryError, ProtocolError
from kvferry.settings import NodeSettings

TIMEOUT_S = 3.0
_CLOCKS_S = 5.0
_NEARLY_FULL = 0.95


def node(settings: NodeSettings) -> Iterator[Finding]:
    """This machine's daemon, and what it says of the others."""
    from kvferry.node.client import NodeClient

    asked = time.time()
    try:
        with NodeClient(settings.socket, timeout_s=TIMEOUT_S) as client:
            hello, status = client.hello(), client.status()
    except ProtocolError as exc:
        yield Finding("node", FAIL, f"it speaks another protocol: {exc}", _same_release())
        return
    except FerryError as exc:
        remedy = "kvferry up (everything on one machine), or kvferry node"
        state = FAIL if has_mlx() else WARN
        if settings.socket.exists():
            what, remedy = (
                f"does not answer: {_short(exc)}",
                f"look at its log; restart it: {remedy}",
            )
        else:
            what = f"does not run: there is no {settings.socket}"
        yield Finding("node", state, what, remedy)
        return
    yield Finding("node", OK, f"{hello.node_id} on {settings.socket}")
    yield from _release("node", hello.version)
    yield from _clock("node", status.unix_s, asked)
    if not hello.namespace_salt:
        remedy = "start the coordinator that node.coordinator names; it gives one out"
        yield Finding("namespace", FAIL, "none yet: neither hits nor stores", remedy)
    if settings.store and not status.store_reachable:
        remedy = f"start it (kvferry store), or mend node.store ({settings.store})"
        yield Finding("node's store", FAIL, "the node does not reach it", remedy)
    if settings.coordinator and not status.coordinator_reachable:
        remedy = (
            f"start it (kvferry coordinator), or mend node.coordinator ({settings.coordinator})"
        )
        what = "the node does not reach it, and goes on with its last policy"
        yield Finding("node's coordinator", WARN, what, remedy)
    if status.uploads_pending_bytes > settings.upload_queue_bytes // 2:
        what = f"{size(status.uploads_pending_bytes)} wait for their upload"
        yield Finding("uploads", WARN, what, "is the store full, or the link slow? kvferry status")
    bad = [
        f"{name} {count:,}"
        for name, count in sorted(status.counters.items())
        if count and name.startswith(("corrupt", "upload_refused_", "upload_lost_", "drop_"))
    ]
    if bad:
        yield Finding(
            "node's troubles", WARN, f"since its start: {', '.join(bad)}", "kvferry status"
        )


def store(settings: NodeSettings) -> Iterator[Finding]:
    """The shared store, from here."""
    from kvferry.cluster.sync_client import SyncBlobStoreClient

    if not settings.store:
        remedy = "set node.store, if prompts shall survive this machine"
        yield Finding("store", WARN, "none configured", remedy)
        return
    asked = time.time()
    try:
        with SyncBlobStoreClient(
            settings.store, timeout_s=TIMEOUT_S, credentials=Credentials.of(settings)
        ) as client:
            stat = client.stat()
    except ProtocolError as exc:
        yield Finding("store", FAIL, f"it speaks another protocol: {exc}", _same_release())
        return
    except FerryError as exc:
        remedy = f"start it (kvferry store), or mend node.store ({settings.store})"
        yield Finding("store", FAIL, f"{settings.store}: {_short(exc)}", remedy)
        return
    used = f"{size(stat.bytes)} of {size(stat.budget_bytes)} in {stat.blobs:,} blobs"
    yield Finding("store", OK, f"{settings.store}: {used}")
    yield from _release("store", stat.version)
    yield from _clock("store", stat.unix_s, asked)
    if stat.bytes > _NEARLY_FULL * stat.budget_bytes:
        what = f"{used}: what was not used for longest goes"
        yield Finding("store's budget", WARN, what, "raise store.budget_bytes if that is too soon")
    if stat.quarantined:
        what = f"{stat.quarantined:,} damaged blobs were set aside"
        yield Finding("store's blobs", WARN, what, "kvferry verify; and look after its disk")
    for tier in stat.tiers:
        if not tier.healthy:
            what = f"{tier.name} before it does not answer: blobs come from behind it, slower"
            yield Finding("store's hot tier", WARN, what, "start it, or mend store.hot")


def coordinator(settings: NodeSettings) -> Iterator[Finding]:
    """The coordinator, from here, and the machines that it knows."""
    from kvferry.cluster.coordinator_client import CoordinatorClient

    if not settings.coordinator:
        yield Finding("coordinator", WARN, "none configured: one machine by itself")
        return

    async def ask() -> tuple[Any, Any]:
        async with CoordinatorClient(
            settings.coordinator, timeout_s=TIMEOUT_S, credentials=Credentials.of(settings)
        ) as client:
            return await client.members(), await client.explain(0)

    asked = time.time()
    try:
        members, explained = asyncio.run(ask())
    except ProtocolError as exc:
        yield Finding("coordinator", FAIL, f"it speaks another protocol: {exc}", _same_release())
        return
    except FerryError as exc:
        remedy = (
            f"start it (kvferry coordinator), or mend node.coordinator ({settings.coordinator})"
        )
        yield Finding("coordinator", FAIL, f"{settings.coordinator}: {_short(exc)}", remedy)
        return
    names = ", ".join(f"{m.node_id} ({m.state})" for m in members.members) or "nobody"
    yield Finding("coordinator", OK, f"{settings.coordinator}: {names}")
    yield from _release("coordinator", members.version)
    yield from _clock("coordinator", members.unix_s, asked)
    if explained.problem:
        remedy = "mend the policy file; the last one that could be read is in force"
        yield Finding("policy", WARN, explained.problem, remedy)
    for member in members.members:
        yield from _release(member.node_id, member.version)


def _release(name: str, found: str) -> Iterator[Finding]:
    if found != __version__:
        what = f"runs release {found or 'unknown'}, this is {__version__}"
        yield Finding(f"{name}'s release", WARN, what, _same_release())


def _clock(name: str, theirs: float, asked: float) -> Iterator[Finding]:
    yield from clock(name, theirs, asked, time.time())


def clock(name: str, theirs: float, asked: float, heard: float) -> Iterator[Finding]:
    """Their clock lies between asking and hearing, or is another one; 0: not told."""
    if not theirs or asked - _CLOCKS_S <= theirs <= heard + _CLOCKS_S:
        return
    off = theirs - heard if theirs > heard else theirs - asked
    what = f"{abs(off):,.0f} s {'ahead of' if off > 0 else 'behind'} this machine's"
    remedy = "set both by NTP: tails and leases end by the clock"
    yield Finding(f"{name}'s clock", WARN, what, remedy)


def _same_release() -> str:
    return f"install the same release everywhere (here {__version__}) and restart it"


def _short(exc: FerryError) -> str:
    return str(exc).rpartition(": ")[2]
