"""``kvferry up``: store, coordinator and node daemon in one process, for one machine."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(up)


def up(
    data_dir: Annotated[
        Path | None, typer.Option(help="One folder for all three; default: each its own.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(help="Unix socket for hooks.")] = None,
    policy_file: Annotated[
        Path | None, typer.Option(help="TOML policy; read again when it changes.")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="JSON with the addresses, written when ready.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Run everything that one machine needs; their own settings hold for each part."""
    import asyncio

    from kvferry.cluster.allocator import tune_allocator
    from kvferry.cluster.service import run_service, setup_logging
    from kvferry.node.together import start_together

    setup_logging(log_level)
    tune_allocator()
    asyncio.run(
        run_service(
            "up",
            lambda: start_together(data_dir, socket, policy_file),
            ready_file=ready_file,
        )
    )
