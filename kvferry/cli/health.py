"""``kvferry health``: does a service of ours answer, and does it serve?"""

from typing import Annotated, Any

import typer

from kvferry.cli.output import JsonOption, write_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(health)


def health(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="HOST:PORT or unix:PATH.")],
    service: Annotated[str, typer.Option(help="One service; empty: the whole server.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.1, max=60, help="Wait so long.")] = 3.0,
    json: JsonOption = None,
) -> None:
    """Ask a store, node or coordinator for its health. Exit code 1: it does not serve."""
    state = _ask(address, service, timeout_s)
    if json:
        write_json({"address": address, "service": service, "state": state}, json)
    else:
        typer.echo(f"{address}: {state}")
    if state != "SERVING":
        raise typer.Exit(1)


def _ask(address: str, service: str, timeout_s: float) -> str:
    """SERVING, NOT_SERVING or SERVICE_UNKNOWN.

    Raises: ConfigError for no address; StoreUnavailableError, StoreTimeoutError.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from kvferry.cli.blob_source import as_address, credentials, is_address
    from kvferry.cluster.status import error_from_rpc
    from kvferry.cluster.wire import MAX_REQUEST_BYTES, channel_options
    from kvferry.errors import ConfigError

    if not is_address(address):
        raise ConfigError("address", address, "HOST:PORT, unix:PATH or the path of a socket")
    where = as_address(address)
    options = channel_options(MAX_REQUEST_BYTES)
    secure = credentials().channel(where)
    with (
        grpc.insecure_channel(where, options=options)
        if secure is None
        else grpc.secure_channel(where, secure, options=options)
    ) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            reply = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError as exc:
            if exc.code() is grpc.StatusCode.NOT_FOUND:
                return "SERVICE_UNKNOWN"
            raise error_from_rpc(address, exc) from exc
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
