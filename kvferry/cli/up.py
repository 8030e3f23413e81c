"""``kvferry up``: store, coordinator and node daemon in one process, for one machine."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.options import LogLevelOption, PolicyFileOption, ReadyFileOption, SocketOption


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(up)


def up(
    data_dir: Annotated[
        Path | None, typer.Option(help="One folder for all three; default: each its own.")
    ] = None,
    socket: SocketOption = None,
    policy_file: PolicyFileOption = None,
    ready_file: ReadyFileOption = None,
    log_level: LogLevelOption = "warning",
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
