"""``kvferry inspect``: what a blob says about itself, and whether it is whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.output import JsonOption, write_json

if TYPE_CHECKING:
    from kvferry.cli.blob_report import BlobReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(inspect)


def inspect(
    blob: Annotated[
        str, typer.Argument(metavar="FILE_OR_KEY", help="A blob file, a key, or a page key.")
    ],
    store: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Get the key from this store.")
    ] = None,
    node: Annotated[
        Path | None, typer.Option(metavar="SOCKET", help="Get the key from this node.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Show a blob: identity, layers, streams, sizes, checksums. Exit code 1: damaged."""
    from kvferry.cli import blob_source as sources
    from kvferry.cli.blob_screen import as_json, print_report

    address = sources.address_of(store, node)
    path = Path(blob)
    if path.exists():
        report = sources.report_file(path)
    else:
        keys = sources.keys_of(blob, address)
        address = address or sources.default_address()
        if len(keys) > 1:
            _list(blob, [str(key) for key in keys], json)
            return
        report = sources.report_key(keys[0], address)
    calibration = _calibration(report, address)
    if json:
        write_json(as_json(report, calibration), json)
    else:
        print_report(report, calibration)
    if not report.ok:
        raise typer.Exit(1)


def _calibration(report: "BlobReport", address: str) -> str | None:
    """Where the blob's calibration is; None where it needs none."""
    from kvferry.cli.blob_source import calibration_place

    if report.header is None or not report.header.codec.calibration_id:
        return None
    return calibration_place(report.header.codec.calibration_id, address)


def _list(page: str, keys: list[str], json: str | None) -> None:
    if json:
        write_json({"page_key": page, "keys": keys}, json)
        return
    typer.echo(f"{len(keys)} blobs of this page; inspect one of them:")
    for key in keys:
        typer.echo(f"  {key}")
