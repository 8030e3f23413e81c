"""``kvferry store``: the shared store."""

from typing import Annotated

import typer

from kvferry.cli.options import (
    DiscoveryOption,
    LogLevelOption,
    MaxBlobOption,
    MetricsOption,
    PlaintextOption,
    ReadyFileOption,
    ReserveOption,
    ServeOption,
    TlsDirOption,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(store)


def store(
    listen: ServeOption = None,
    metrics_listen: MetricsOption = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Where blobs are kept: file:///PATH or s3://BUCKET/PREFIX."),
    ] = None,
    budget_bytes: Annotated[
        int | None, typer.Option(help="Hard budget of everything under the root.")
    ] = None,
    reserve_bytes: ReserveOption = None,
    max_blob_bytes: MaxBlobOption = None,
    staged_ttl_s: Annotated[
        float | None, typer.Option(help="Blobs staged and never committed end after so long.")
    ] = None,
    hot: Annotated[
        str | None,
        typer.Option(help="Redis before it: redis://HOST:PORT, redis+cluster://HOST:PORT,..."),
    ] = None,
    hot_bytes: Annotated[
        int | None, typer.Option(help="Memory limit given to Redis, 0: it has its own.")
    ] = None,
    hot_fill: Annotated[
        str | None, typer.Option(help="What goes to Redis: what was read, put, or both.")
    ] = None,
    scrub_bytes_per_s: Annotated[
        int | None, typer.Option(help="Read and compare all blobs at this rate, 0: never.")
    ] = None,
    replica: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="May have whole copies of what is damaged."),
    ] = None,
    discovery: DiscoveryOption = None,
    max_age_s: Annotated[
        float | None, typer.Option(help="Pages of a bucket not used for so long go; 0: none.")
    ] = None,
    sweep_s: Annotated[float | None, typer.Option(help="Between two sweeps of a bucket.")] = None,
    allow_remote_plaintext: PlaintextOption = None,
    tls_dir: TlsDirOption = None,
    ready_file: ReadyFileOption = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Run the shared store: blobs by key, complete pages, a hard byte budget."""
    import asyncio

    from prometheus_client import CollectorRegistry

    from kvferry.cluster.allocator import tune_allocator
    from kvferry.cluster.service import run_service, setup_logging
    from kvferry.cluster.store_service import start_store
    from kvferry.settings import StoreSettings

    setup_logging(log_level)
    tune_allocator()
    settings = StoreSettings.load(
        listen=listen,
        metrics_listen=metrics_listen,
        backend=backend,
        budget_bytes=budget_bytes,
        reserve_bytes=reserve_bytes,
        max_blob_bytes=max_blob_bytes,
        staged_ttl_s=staged_ttl_s,
        hot=hot,
        hot_bytes=hot_bytes,
        hot_fill=hot_fill,
        scrub_bytes_per_s=scrub_bytes_per_s,
        replicas=replica or None,
        discovery=discovery,
        max_age_s=max_age_s,
        sweep_s=sweep_s,
        allow_remote_plaintext=allow_remote_plaintext,
        tls_dir=tls_dir,
    )
    registry = CollectorRegistry()
    asyncio.run(
        run_service(
            "store",
            lambda: start_store(settings, registry),
            registry=registry,
            metrics_listen=settings.metrics_listen,
            allow_remote_plaintext=settings.allow_remote_plaintext,
            ready_file=ready_file,
        )
    )
