"""``kvferry verify``: are all blobs of a folder or a store whole?"""

from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.output import JsonOption, progress, write_json

if TYPE_CHECKING:
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
        bool, typer.Option("--repair", help="A store sets damaged blobs aside.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Check every blob of a folder, or have a store check its own. Exit code 1: some are bad."""
    from pathlib import Path

    from kvferry.cli.blob_source import as_address, is_address
    from kvferry.cli.verify_run import as_json, print_tally
    from kvferry.errors import ConfigError

    path = Path(target.removeprefix("file://"))
    if path.is_dir() or path.is_file():
        if repair:
            raise ConfigError("--repair", target, "for a running store: HOST:PORT")
        tally = _folder(path)
    elif is_address(target):
        tally = _store(as_address(target), repair)
    else:
        allowed = "a folder or file that exists, HOST:PORT of a store, or a node's socket"
        raise ConfigError("target", target, allowed)
    if json:
        write_json(as_json(target, tally), json)
    else:
        print_tally(target, tally)
    if tally.bad:
        raise typer.Exit(1)


def _folder(path: "Path") -> "Tally":
    from kvferry.cli.verify_run import check_files, files_below

    files = files_below(path)
    with progress("verifying", max(1, files.bytes)) as bar:
        return check_files(files, lambda done: bar.update(done))


def _store(address: str, repair: bool) -> "Tally":
    import asyncio

    from kvferry.cli.verify_run import scrub

    with progress("verifying", 1.0) as bar:
        return asyncio.run(scrub(address, repair, lambda share: bar.update(share)))
