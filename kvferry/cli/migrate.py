"""``kvferry migrate``: all blobs from one store to another."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import typer

from kvferry.cli.output import JsonOption, progress, write_json

if TYPE_CHECKING:
    from kvferry.cluster.migrate import Moved, Survey, Wanted
    from kvferry.cluster.space import StoreLimits

PLACES = "file:///PATH, s3://BUCKET, redis://HOST:PORT, redis+cluster://HOST:PORT,..., HOST:PORT"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(migrate)


def migrate(
    source: Annotated[str, typer.Argument(metavar="FROM", help=PLACES + " of a running store.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The same.")],
    model: Annotated[
        str, typer.Option(metavar="HEX", help="Only this model's: its id, or how it begins.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what is missing.")] = False,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Blobs at a time.")] = 4,
    budget_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Of a folder that is written to. Default: the disk's room."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Copy pages, tails, states and calibrations; what is there already is left out.

    Every blob is verified where it is read and again where it is written. Ctrl-C ends it
    after the blobs under way; the same command goes on from there. A folder that a running
    store uses is reached by that store's HOST:PORT. Exit code 1: some could not be copied.
    """
    from kvferry.cli.interrupt import INTERRUPTED, stop_signals
    from kvferry.cluster.migrate import Wanted
    from kvferry.errors import ConfigError

    if source == target:
        raise ConfigError("TO", target, "another place than FROM")
    folder = source.removeprefix("file://")
    if folder != source and not Path(unquote(folder)).is_dir():
        raise ConfigError("FROM", source, "a folder that exists")
    if not all(c in "0123456789abcdef" for c in model) or len(model) > 64:
        raise ConfigError("--model", model, "hex digits of a model id (`kvferry explain`)")
    with stop_signals() as stopping:
        found, moved = asyncio.run(
            _run(source, target, Wanted(model=model), dry_run, parallel, budget_bytes, stopping)
        )
    value = _as_json(found, moved)
    if json:
        write_json(value, json)
    if json != "-":
        typer.echo(_line(found, moved))
        for key, why in list(moved.failed.items())[:20] if moved else ():
            typer.echo(f"  {key}: {why}", err=True)
    if moved is not None and moved.stopped:
        typer.echo("kvferry: interrupted; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED)
    if moved is not None and moved.failures:
        raise typer.Exit(1)


async def _run(
    source: str,
    target: str,
    wanted: "Wanted",
    dry_run: bool,
    parallel: int,
    budget_bytes: int | None,
    stopping: Callable[[], bool],
) -> "tuple[Survey, Moved | None]":
    from kvferry.cli.blob_source import credentials
    from kvferry.cluster import migrate as work
    from kvferry.cluster.open_store import open_store
    from kvferry.settings import StoreSettings

    settings = StoreSettings.load()
    async with AsyncExitStack() as stack:
        most = settings.max_blob_bytes
        shown = credentials()
        first = await open_store(source, _limits(None, 0, most), shown)
        stack.push_async_callback(first.aclose)
        limits = _limits(budget_bytes, settings.reserve_bytes, most)
        second = await open_store(target, limits, shown)
        stack.push_async_callback(second.aclose)
        found = await work.survey(first, second, wanted, stopping)
        if stopping():
            return found, work.Moved(stopped=True)
        if dry_run:
            return found, None
        await work.check_room(second, found.missing_bytes)
        total = found.missing_bytes + found.present_bytes
        with progress("copying", max(1, total)) as bar:
            moved = await work.migrate(
                first,
                second,
                wanted,
                parallel=parallel,
                progress=lambda blobs, size: bar.update(size, f"{blobs:,} blobs"),
                stopping=stopping,
            )
        return found, moved


def _limits(budget: int | None, reserve: int, max_blob: int) -> "StoreLimits":
    from kvferry.cluster.space import StoreLimits

    # Nothing is ever evicted to be read, nor for what is written: see `check_room`.
    return StoreLimits(
        budget_bytes=budget or 1 << 62, reserve_bytes=reserve, max_blob_bytes=max_blob
    )


def _line(found: "Survey", moved: "Moved | None") -> str:
    from kvferry.cli.blob_screen import mib

    if moved is None:
        kinds = ", ".join(
            f"{n:,} {kind}{'s' if n > 1 else ''}" for kind, n in sorted(found.kinds.items())
        )
        return (
            f"{found.missing:,} blobs to copy ({mib(found.missing_bytes)}"
            f"{': ' + kinds if kinds else ''}), {found.present:,} there already"
        )
    parts = [
        f"{moved.copied:,} blobs copied ({mib(moved.copied_bytes)})",
        f"{moved.present:,} there already",
    ]
    if moved.gone:
        parts.append(f"{moved.gone:,} gone meanwhile")
    for reason, count in sorted(moved.failures.items()):
        parts.append(f"{count:,} not copied: {reason}")
    return ", ".join(parts)


def _as_json(found: "Survey", moved: "Moved | None") -> Mapping[str, object]:
    value: dict[str, object] = {
        "missing": found.missing,
        "missing_bytes": found.missing_bytes,
        "missing_kinds": dict(found.kinds),
        "dry_run": moved is None,
    }
    if moved is None:
        return value | {"present": found.present, "present_bytes": found.present_bytes}
    return value | {
        "copied": moved.copied,
        "copied_bytes": moved.copied_bytes,
        "present": moved.present,
        "gone": moved.gone,
        "failures": dict(moved.failures),
        "failed": moved.failed,
        "stopped": moved.stopped,
    }
