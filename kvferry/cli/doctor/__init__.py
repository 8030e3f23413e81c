"""``kvferry doctor``: what is wrong with this machine's setup, and what to do about it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.output import JsonOption, write_json

if TYPE_CHECKING:
    from kvferry.cli.doctor.finding import Finding


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Look at this model too: smollm2, a folder, or a hub id.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="Unix socket of this machine's node.")] = None,
    store: Annotated[str | None, typer.Option(help="HOST:PORT of the store.")] = None,
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of the coordinator.")] = None,
    json: JsonOption = None,
) -> None:
    """Check software, services, folders and settings; each line says what to do.

    Nothing is changed. Exit code 1: something fails.
    """
    found = _findings(model, socket, store, coordinator)
    counts = {state: sum(f.state == state for f in found) for state in ("ok", "warn", "fail")}
    if json:
        lines = [
            {"name": f.name, "state": f.state, "text": f.text, "remedy": f.remedy} for f in found
        ]
        write_json({**counts, "checks": lines}, json)
    if json != "-":
        _print(found, counts)
    if counts["fail"]:
        raise typer.Exit(1)


def _findings(
    model: str | None, socket: Path | None, store: str | None, coordinator: str | None
) -> "list[Finding]":
    from kvferry.cli.doctor import machine, security, services, software
    from kvferry.cli.doctor.finding import Check, run_checks
    from kvferry.cli.doctor.model import model as check_model
    from kvferry.errors import ConfigError
    from kvferry.settings import CoordinatorSettings, NodeSettings, StoreSettings

    first = list(
        run_checks(
            [
                ("python", software.python),
                ("mlx", software.packages),
                ("device", software.device),
                ("openblas", software.openblas),
                ("hooks", software.hooks),
                ("settings", machine.settings),
            ]
        )
    )
    try:
        node = NodeSettings.load(socket=socket, store=store, coordinator=coordinator)
        stores, coordinators = StoreSettings.load(), CoordinatorSettings.load()
    except ConfigError:
        return first  # said already, and all that follows needs them
    more: list[tuple[str, Check]] = [
        ("memory", partial(machine.memory, node)),
        ("folders", partial(machine.folders, node, stores)),
        ("socket", partial(machine.socket, node)),
        ("node", partial(services.node, node)),
        ("store", partial(services.store, node)),
        ("coordinator", partial(services.coordinator, node)),
        ("certificate", partial(security.certificate, node, stores, coordinators)),
        ("exposure", partial(security.exposure, node, stores, coordinators)),
    ]
    if model is not None:
        more.append(("model", partial(check_model, model)))
    elif software.has_mlx():
        more.append(("calibrations", machine.calibrations))
    return [*first, *run_checks(more)]


def _print(found: "Sequence[Finding]", counts: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvferry.cli.blob_screen import clean

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        words = Text(clean(finding.text))
        if finding.remedy:
            words.append(f"\n-> {clean(finding.remedy)}", style="dim")
        table.add_row(Text(finding.state, styles[finding.state]), Text(finding.name), words)
    out = Console()
    out.print(table)
    out.print(
        f"{counts['ok']} ok, {counts['warn']} to note, {counts['fail']} failing", style="bold"
    )
