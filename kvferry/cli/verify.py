"""``kvferry verify``: are all blobs of a folder or a store whole?"""

from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.output import JsonOption, progress, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvferry.cli.verify_run import Tally


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(verify)


def verify(
    target: Annotated[
        str,
        typer.Argument(metavar="DIR_OR_STORE", help="A folder, a file, HOST:PORT or a socket."),
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="A store sets damaged blobs aside, and mends them.")
    ] = False,
    source: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="HOST:PORT", help="A node or store that may have copies."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Check every blob of a folder, or have a store check its own. Exit code 1: some are bad.

    With --repair a store puts whole copies in the place of damaged blobs, from its hot tier,
    from the replicas of its settings, and from nodes and stores given with --from.
    """
    from pathlib import Path

    from kvferry.cli.blob_source import as_address, is_address
    from kvferry.cli.verify_run import as_json, print_tally
    from kvferry.errors import ConfigError

    path = Path(target.removeprefix("file://"))
    if path.is_dir() or path.is_file():
        if repair or source:
            raise ConfigError("--repair", target, "for a running store: HOST:PORT")
        tally = _folder(path)
    elif is_address(target):
        if source and not repair:
            raise ConfigError("--from", source[0], "given with --repair")
        if wrong := next((place for place in source or () if not is_address(place)), None):
            raise ConfigError("--from", wrong, "HOST:PORT of a node or store, or its socket")
        tally = _store(as_address(target), repair, [as_address(p) for p in source or ()])
    else:
        allowed = "a folder or file that exists, HOST:PORT of a store, or a node's socket"
        raise ConfigError("target", target, allowed)
    if json:
        write_json(as_json(target, tally), json)
    else:
        print_tally(target, tally)
    if tally.damaged:
        raise typer.Exit(1)


def _folder(path: "Path") -> "Tally":
    from kvferry.cli.verify_run import check_files, files_below

    files = files_below(path)
    with progress("verifying", max(1, files.bytes)) as bar:
        return check_files(files, lambda done: bar.update(done))


def _store(address: str, repair: bool, sources: "Sequence[str]") -> "Tally":
    import asyncio

    from kvferry.cli.verify_run import scrub

    with progress("verifying", 1.0) as bar:
        return asyncio.run(scrub(address, repair, sources, lambda share: bar.update(share)))
