"""The work behind ``kvferry verify``: files one by one, or a store's own scrub."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvferry.cli.blob_report import BlobReport
from kvferry.cli.blob_screen import clean, mib
from kvferry.cli.blob_source import report_file
from kvferry.cluster.blob_name import parse_blob_name
from kvferry.errors import ConfigError, FerryError, InvalidKeyError
from kvferry.proto.container import MAGIC_NAME

MAX_SHOWN = 50
# Folders of a store's or node's root that do not hold blobs in use.
_SCRATCH = frozenset({"tmp"})
_ASIDE = frozenset({"quarantine"})


@dataclass(slots=True)
class Tally:
    """What was checked.

    Attributes:
        counts: kind -> (blobs, bytes). Empty for a store, which tells only a total.
        bad: name of a blob -> what is wrong, field and detail.
        aside: blobs that had been set aside before.
        skipped: files that are no blobs.
        repaired: the bad ones were set aside now.
        mended: name of a bad blob -> who gave a whole copy that is in its place.
    """

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    checked: int = 0
    bytes: int = 0
    bad: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    aside: int = 0
    skipped: int = 0
    repaired: bool = False
    mended: dict[str, str] = field(default_factory=dict)

    @property
    def damaged(self) -> int:
        """Bad ones that no whole copy took the place of."""
        return len(self.bad.keys() - self.mended.keys())

    def add(self, name: str, report: BlobReport) -> None:
        """Count one blob."""
        count, size = self.counts.get(report.kind, (0, 0))
        self.counts[report.kind] = (count + 1, size + report.size)
        self.checked += 1
        self.bytes += report.size
        if not report.ok:
            self.bad[name] = [(c.field, c.detail) for c in report.checks if not c.ok]


@dataclass(frozen=True, slots=True)
class Files:
    """Blob files below a folder, by name, with their sizes."""

    root: Path
    found: Sequence[tuple[Path, int]]
    aside: int
    skipped: int

    @property
    def bytes(self) -> int:
        """Of all files found."""
        return sum(size for _, size in self.found)


def files_below(root: Path) -> Files:
    """All blob files in a tree: by their names, in a store's folders, or by their magic."""
    if root.is_file():
        return Files(root.parent, [(root, root.stat().st_size)], 0, 0)
    found, aside, skipped = [], 0, 0
    for path in _walk(root):
        parents = set(path.relative_to(root).parts[:-1])
        if parents & _SCRATCH:
            continue
        if parents & _ASIDE or path.suffix == ".damaged":
            aside += 1
        elif _is_blob(path):
            found.append((path, path.stat().st_size))
        else:
            skipped += 1
    return Files(root, found, aside, skipped)


def _walk(root: Path) -> Iterator[Path]:
    """Regular files, links not followed, in the order of their names."""
    try:
        entries = sorted(root.iterdir())
    except OSError as exc:
        raise ConfigError("folder", str(root), f"readable ({exc.strerror})") from exc
    for path in entries:
        if path.is_symlink():
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _is_blob(path: Path) -> bool:
    if path.suffix == ".kvferry":
        return True
    try:
        parse_blob_name(path.name)
    except InvalidKeyError:
        with path.open("rb") as file:
            return file.read(len(MAGIC_NAME)) == MAGIC_NAME
    return True


def check_files(files: Files, tell: Callable[[int], None]) -> Tally:
    """Read and examine all. ``tell`` gets the bytes done so far."""
    tally, done = Tally(aside=files.aside, skipped=files.skipped), 0
    for path, size in files.found:
        name = str(path.relative_to(files.root))
        try:
            tally.add(name, report_file(path))
        except FerryError as exc:
            if path.exists():  # else a running store has evicted it since
                tally.checked += 1
                tally.bad[name] = [("file", str(exc))]
        done += size
        tell(done)
    return tally


async def scrub(
    address: str, repair: bool, sources: Sequence[str], tell: Callable[[float], None]
) -> Tally:
    """Have a store or node verify what it holds. ``tell`` gets the share done.

    Args:
        sources: addresses of who may have whole copies of what it cannot mend itself.
    Raises: StoreUnavailableError, ProtocolError.
    """
    from kvferry.cli.clients import store_client
    from kvferry.cluster.mend import RemoteReplica, mend
    from kvferry.cluster.remote_store import RemoteStore
    from kvferry.proto.keys import BlobKey

    tally = Tally(repaired=repair)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(store_client(address))
        others = [await stack.enter_async_context(store_client(place)) for place in sources]
        held = await client.stat()
        tally.bytes, tally.aside = held.bytes, held.quarantined
        async for report in client.scrub(repair):
            tally.checked = report.checked
            tally.mended.update(report.mended)
            for key, reason in report.findings:
                tally.bad.setdefault(key, []).append(("blob", reason))
                if repair and others and key not in tally.mended:
                    ends, replicas = report.expires.get(key, 0), [RemoteReplica(o) for o in others]
                    giver = await mend(RemoteStore(client), BlobKey.parse(key), ends, replicas)
                    tally.mended.update({key: giver} if giver else {})
            tell(report.checked / report.total if report.total else 1.0)
    return tally


def as_json(target: str, tally: Tally) -> dict[str, object]:
    """One JSON object."""
    return {
        "target": target,
        "ok": not tally.damaged,
        "checked": tally.checked,
        "bytes": tally.bytes,
        "kinds": {kind: {"blobs": n, "bytes": size} for kind, (n, size) in tally.counts.items()},
        "bad": [
            {
                "blob": name,
                "findings": [{"field": f, "detail": d} for f, d in findings],
                "mended_from": tally.mended.get(name, ""),
            }
            for name, findings in tally.bad.items()
        ],
        "set_aside": tally.aside,
        "repaired": tally.repaired,
        "skipped": tally.skipped,
    }


def print_tally(target: str, tally: Tally, console: Console | None = None) -> None:
    """A table of what was checked, and a line for each of what is bad."""
    out = console or Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("blobs")
    table.add_column("count", justify="right")
    table.add_column("size" if tally.counts else "on disk", justify="right")
    for kind, (count, size) in sorted(tally.counts.items()):
        table.add_row(kind, f"{count:,}", mib(size))
    table.add_row("all", f"{tally.checked:,}", mib(tally.bytes), style="bold")
    out.print(table)
    for count, what in ((tally.aside, "set aside before"), (tally.skipped, "other files left out")):
        if count:
            out.print(f"{count:,} {what}", style="dim")
    for name, findings in list(tally.bad.items())[:MAX_SHOWN]:
        out.print(Text(clean(name), style="bold red"), soft_wrap=True)
        if name in tally.mended:
            out.print(Text(f"  mended from {clean(tally.mended[name])}", overflow="fold"))
        for place, detail in findings:
            out.print(Text(f"  {clean(place)}: {clean(detail)}", overflow="fold"))
    if len(tally.bad) > MAX_SHOWN:
        out.print(f"and {len(tally.bad) - MAX_SHOWN:,} more; --json lists all")
    if tally.bad:
        done = ", now set aside" if tally.repaired else ""
        done += f"; {len(tally.mended):,} mended" if tally.mended else ""
        out.print(Text(f"{len(tally.bad):,} of {tally.checked:,} damaged{done}", style="bold red"))
    else:
        out.print(Text(f"all {tally.checked:,} whole", style="bold green"))
