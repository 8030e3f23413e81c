"""``kvferry coordinator``: who is there, and the policy."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(coordinator)


def coordinator(
    listen: Annotated[str | None, typer.Option(help="HOST:PORT to serve on.")] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for Prometheus, empty: none.")
    ] = None,
    policy_file: Annotated[
        Path | None, typer.Option(help="TOML policy; read again when it changes.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the namespace's secret and the policy in force.")
    ] = None,
    heartbeat_interval_s: Annotated[
        float | None, typer.Option(help="How often nodes report.")
    ] = None,
    away_after_s: Annotated[
        float | None, typer.Option(help="A node not heard of for so long is away.")
    ] = None,
    allow_remote_plaintext: Annotated[
        bool | None, typer.Option(help="Bind beyond loopback although there is no TLS.")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="JSON with the address, written when ready.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the coordinator: members, and the policy that steers the nodes."""
    import asyncio

    from kvferry.cluster.coordinator import Coordinator
    from kvferry.cluster.coordinator_service import start_coordinator
    from kvferry.cluster.service import run_service, setup_logging
    from kvferry.settings import CoordinatorSettings

    setup_logging(log_level)
    settings = CoordinatorSettings.load(
        listen=listen,
        metrics_listen=metrics_listen,
        policy_file=policy_file,
        data_dir=data_dir,
        heartbeat_interval_s=heartbeat_interval_s,
        away_after_s=away_after_s,
        allow_remote_plaintext=allow_remote_plaintext,
    )

    async def run() -> None:
        made = await Coordinator.open(settings)
        await run_service(
            "coordinator",
            lambda: start_coordinator(made, settings),
            registry=made.metrics.registry,
            metrics_listen=settings.metrics_listen,
            allow_remote_plaintext=settings.allow_remote_plaintext,
            ready_file=ready_file,
        )

    asyncio.run(run())
