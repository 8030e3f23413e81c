"""What ``kvferry status`` puts on the screen."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvferry.cli import status_leaders

if TYPE_CHECKING:
    from rich.console import Console

Answer = dict[str, Any]
CENTURY = 100


def print_status(found: Mapping[str, Answer]) -> None:
    """Services, and beneath them the links and exo's shards that members tell of."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kvferry", title_justify="left", show_lines=True)
    for name in ("service", "address", "state"):
        table.add_column(name, overflow="fold")
    words = {"node": _node_words, "store": _store_words, "coordinator": _coordinator_words}
    for name, answer in found.items():
        said = words[name](answer) if answer["up"] else [f"down: {_short(answer['problem'])}"]
        table.add_row(name, answer["address"].replace(",", "\n") or "-", "\n".join(said))
    console = Console()
    console.print(table)
    _print_links(console, found)
    _print_exo(console, found)


def _print_links(console: "Console", found: Mapping[str, Answer]) -> None:
    """The link table: of all members where the coordinator answers, else of this node."""
    from rich.table import Table

    rows = [(m["node_id"], link) for m in _members(found) for link in m["links"]]
    if not rows and found["node"]["up"]:
        rows = [(found["node"]["node_id"], link) for link in found["node"]["links"]]
    if not rows:
        return
    table = Table("from", "to", "kind", "bandwidth", "latency", "measured", title="links")
    table.title_justify = "left"
    for name, link in rows:
        table.add_row(
            name,
            link["to"],
            link["kind"] or "-",
            f"{_size(int(link['bytes_per_s']))}/s" if link["bytes_per_s"] else "-",
            f"{link['latency_s'] * 1000:.1f} ms" if link["latency_s"] else "-",
            _when(link),
        )
    console.print(table)


def _when(link: Answer) -> str:
    if not link["age_s"]:
        return "never"
    how = "probe" if link["probed"] else "blobs"
    return f"{_time(link['age_s'])} ago, {how}"


def _print_exo(console: "Console", found: Mapping[str, Answer]) -> None:
    """What exo runs where; every machine of one exo cluster tells the same."""
    from rich.table import Table

    told = [m["exo"] for m in _members(found)] + [found["node"].get("exo")]
    state = next((exo for exo in told if exo), None)
    if state is None:
        return
    names = {n["node_id"]: n["name"] or n["node_id"] for n in state["nodes"]}
    runs: dict[str, list[str]] = {}
    for shard in state["shards"]:
        span = f"{shard['layer_start']}-{shard['layer_end']} of {shard['layers']}"
        which = f"rank {shard['rank']} of {shard['ranks']}, {shard['sharding']}"
        runs.setdefault(shard["node_id"], []).append(f"{shard['model']}: {span} ({which})")
    table = Table("machine", "chip", "memory free", "runs", title="exo", title_justify="left")
    for node in state["nodes"]:
        free, total = int(node["free_memory_bytes"]), int(node["memory_bytes"])
        memory = f"{_size(free)} of {_size(total)}" if total else "-"
        runs_here = "\n".join(runs.get(node["node_id"], ["-"]))
        table.add_row(names[node["node_id"]], node["chip"] or "-", memory, runs_here)
    console.print(table)


def _members(found: Mapping[str, Answer]) -> Sequence[Answer]:
    members: Sequence[Answer] = found["coordinator"].get("members", [])
    return members


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
    draining = ["draining: takes no new blobs" + (", drained" if a["drained"] else "")]
    return [
        f"{a['node_id']}, version {a['version']}, {_size(a['resident_bytes'])} resident",
        *(draining if a["phase"] == "draining" else []),
        *tiers,
        *_write_words(a.get("disk_writes")),
        f"waiting for upload: {a['uploads_pending']:,} blobs, {_size(a['uploads_pending_bytes'])}",
        f"store {store}, coordinator {link}; peers: {peers}",
        f"policy {a['policy_name']!r}, version {a['policy_version']}",
        *_trouble(a["counters"]),
    ]


def _write_words(w: Answer | None) -> list[str]:
    """What the disk tier writes, and how long a disk lasts so; no disk tier: no line."""
    if not w:
        return []
    years = w["lifetime_years"]
    long = "more than a century" if years > CENTURY else f"{years:,.1f} years"
    lasts = f", at this pace the disk lasts {long}" if years else ""
    return [f"written to disk today: {_size(w['today'])} of {_size(w['budget_per_day'])}{lasts}"]


def _store_words(a: Answer) -> list[str]:
    return [
        f"{a['blobs']:,} blobs, {_size(a['bytes'])} of {_size(a['budget_bytes'])}",
        f"in {a['backend']}",
        f"{a['pages_complete']:,} complete pages, {a['pinned']:,} blobs under a lease, "
        f"{a['quarantined']:,} damaged and set aside",
        f"{_size(a['free_disk_bytes'])} free on its disk",
        *(_tier_words(tier) for tier in a["tiers"]),
        *(_namespace_words(use) for use in a["namespaces"] if use["quota_bytes"]),
        *(_lease_words(lease, a["unix_s"]) for lease in a["leases"]),
        *_trouble(a["counters"]),
    ]


def _tier_words(tier: Mapping[str, Any]) -> str:
    counted = tier["counters"]
    hits, misses = counted.get("hits", 0), counted.get("misses", 0)
    bad = [f"{n} {c:,}" for n, c in sorted(counted.items()) if c and n.startswith("failed_")]
    state = "" if tier["healthy"] else ", not reachable"
    return (
        f"{tier['name']}: {tier['blobs']:,} blobs, {_size(tier['bytes'])}{state}; "
        f"{hits:,} hits, {misses:,} misses, {counted.get('evicted', 0):,} evicted"
        f"{'; ' + ', '.join(bad) if bad else ''}"
    )


def _namespace_words(use: Mapping[str, Any]) -> str:
    name = use["name"] or use["tag"]
    return f"namespace {name}: {_size(use['bytes'])} of {_size(use['quota_bytes'])}"


def _lease_words(lease: Mapping[str, Any], now: float) -> str:
    hours = max(0.0, lease["expires_unix_s"] - now) / 3600
    return (
        f"lease {lease['lease_id']}: {lease['blobs']:,} blobs, {_size(lease['bytes'])}, "
        f"{lease['token_end']:,} tokens of model {lease['model_id'][:12]}, {hours:,.1f} h left"
    )


def _coordinator_words(a: Answer) -> list[str]:
    members = [
        f"{m['node_id']}: {_stands(m)}, heard of {_time(m['seconds_since_heartbeat'])} ago"
        for m in a["members"]
    ]
    leaders = status_leaders.words(a["coordinators"])
    if not status_leaders.somebody_leads(a["coordinators"]):
        return leaders
    return [
        *leaders,
        f"policy {a['policy_name']!r}, version {a['policy_version']}",
        *(members or ["no members"]),
    ]


def _stands(member: Answer) -> str:
    return "drained" if member["drained"] else str(member["state"])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


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
