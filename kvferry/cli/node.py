"""``kvferry node``: the daemon on each machine."""

from pathlib import Path
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
    SocketOption,
    TlsDirOption,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(node)


def node(
    node_id: Annotated[str | None, typer.Option(help="Name of this machine.")] = None,
    socket: SocketOption = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for peers.")] = None,
    metrics_listen: MetricsOption = None,
    store: Annotated[str | None, typer.Option(help="HOST:PORT of the store, empty: none.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT[,...] of the coordinators, empty: none.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of its state and blobs.")] = None,
    memory_bytes: Annotated[int | None, typer.Option(help="Budget of the memory tier.")] = None,
    disk_bytes: Annotated[int | None, typer.Option(help="Budget on disk, 0: none.")] = None,
    disk_reserve_bytes: ReserveOption = None,
    upload_queue_bytes: Annotated[int | None, typer.Option(help="Bytes that may wait.")] = None,
    upload_workers: Annotated[int | None, typer.Option(help="Uploads at a time.")] = None,
    max_blob_bytes: MaxBlobOption = None,
    request_timeout_s: Annotated[
        float | None, typer.Option(help="For one transfer altogether.")
    ] = None,
    peer_timeout_s: Annotated[float | None, typer.Option(help="For a peer's answer.")] = None,
    holdings_interval_s: Annotated[
        float | None, typer.Option(help="Between questions to a peer about what it holds.")
    ] = None,
    serve_bytes_per_s: Annotated[
        float | None, typer.Option(help="Sent to peers at most, 0: as fast as it goes.")
    ] = None,
    handover_bytes: Annotated[
        int | None, typer.Option(help="Taken from peers that leave, in an hour.")
    ] = None,
    copies: Annotated[
        int | None, typer.Option(help="Nodes that hold what is read often, 1: no copies.")
    ] = None,
    copy_bytes_per_hour: Annotated[int | None, typer.Option(help="For such copies.")] = None,
    store_on_second_use: Annotated[
        bool | None,
        typer.Option(
            "--store-on-second-use/--store-at-once", help="Whether what is new waits for it."
        ),
    ] = None,
    disk_writes_per_day_bytes: Annotated[
        int | None, typer.Option(help="To disk in a day, 0: so that the disk lasts ten years.")
    ] = None,
    disk_endurance_bytes: Annotated[
        int | None, typer.Option(help="What the disk is rated for (TBW), 0: 300 times its size.")
    ] = None,
    shutdown_timeout_s: Annotated[
        float | None, typer.Option(help="For uploads still queued when it stops.")
    ] = None,
    exo_url: Annotated[
        str | None, typer.Option(help="exo's API on this machine, empty: not asked.")
    ] = None,
    probe_bytes_per_hour: Annotated[
        int | None, typer.Option(help="To measure links that nothing crossed, 0: none.")
    ] = None,
    discovery: DiscoveryOption = None,
    allow_remote_plaintext: PlaintextOption = None,
    tls_dir: TlsDirOption = None,
    ready_file: ReadyFileOption = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Run this machine's daemon: memory and disk tiers, peers, uploads to the store."""
    import asyncio

    from prometheus_client import CollectorRegistry

    from kvferry.cluster.allocator import tune_allocator
    from kvferry.cluster.service import run_service, setup_logging
    from kvferry.node.daemon import start_node
    from kvferry.settings import NodeSettings

    setup_logging(log_level)
    tune_allocator()
    settings = NodeSettings.load(
        node_id=node_id,
        socket=socket,
        listen=listen,
        metrics_listen=metrics_listen,
        store=store,
        coordinator=coordinator,
        data_dir=data_dir,
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        disk_reserve_bytes=disk_reserve_bytes,
        upload_queue_bytes=upload_queue_bytes,
        upload_workers=upload_workers,
        max_blob_bytes=max_blob_bytes,
        request_timeout_s=request_timeout_s,
        peer_timeout_s=peer_timeout_s,
        holdings_interval_s=holdings_interval_s,
        serve_bytes_per_s=serve_bytes_per_s,
        handover_bytes=handover_bytes,
        copies=copies,
        copy_bytes_per_hour=copy_bytes_per_hour,
        store_on_second_use=store_on_second_use,
        disk_writes_per_day_bytes=disk_writes_per_day_bytes,
        disk_endurance_bytes=disk_endurance_bytes,
        shutdown_timeout_s=shutdown_timeout_s,
        exo_url=exo_url,
        probe_bytes_per_hour=probe_bytes_per_hour,
        discovery=discovery,
        allow_remote_plaintext=allow_remote_plaintext,
        tls_dir=tls_dir,
    )
    registry = CollectorRegistry()
    asyncio.run(
        run_service(
            "node",
            lambda: start_node(settings, registry),
            registry=registry,
            metrics_listen=settings.metrics_listen,
            allow_remote_plaintext=settings.allow_remote_plaintext,
            ready_file=ready_file,
        )
    )
