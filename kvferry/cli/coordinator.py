"""``kvferry coordinator``: who is there, and the policy."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.options import (
    DiscoveryOption,
    LogLevelOption,
    MetricsOption,
    PlaintextOption,
    PolicyFileOption,
    ReadyFileOption,
    ServeOption,
    TlsDirOption,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(coordinator)


def coordinator(
    listen: ServeOption = None,
    metrics_listen: MetricsOption = None,
    policy_file: PolicyFileOption = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the namespace's secret and the policy in force.")
    ] = None,
    heartbeat_interval_s: Annotated[
        float | None, typer.Option(help="How often nodes report.")
    ] = None,
    away_after_s: Annotated[
        float | None, typer.Option(help="A node not heard of for so long is away.")
    ] = None,
    etcd: Annotated[
        str | None, typer.Option(help="http://HOST:PORT[,...]: share intent, elect a leader.")
    ] = None,
    etcd_prefix: Annotated[str | None, typer.Option(help="Where this cluster's keys are.")] = None,
    lease_ttl_s: Annotated[
        float | None, typer.Option(help="A leader not heard of for so long is replaced.")
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where nodes find this one.")
    ] = None,
    discovery: DiscoveryOption = None,
    allow_remote_plaintext: PlaintextOption = None,
    tls_dir: TlsDirOption = None,
    ready_file: ReadyFileOption = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Run the coordinator: members, and the policy that steers the nodes."""
    import asyncio

    from kvferry.cli.policy_warnings import warn_of_file
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
        etcd=etcd,
        etcd_prefix=etcd_prefix,
        lease_ttl_s=lease_ttl_s,
        advertise=advertise,
        discovery=discovery,
        allow_remote_plaintext=allow_remote_plaintext,
        tls_dir=tls_dir,
    )

    async def run() -> None:
        made = await Coordinator.open(settings)
        warning = asyncio.create_task(warn_of_file(made.policies))
        try:
            await run_service(
                "coordinator",
                lambda: start_coordinator(made, settings),
                registry=made.metrics.registry,
                metrics_listen=settings.metrics_listen,
                allow_remote_plaintext=settings.allow_remote_plaintext,
                ready_file=ready_file,
            )
        finally:
            warning.cancel()

    asyncio.run(run())
