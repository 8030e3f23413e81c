"""`kvferry health` against a real server."""

import asyncio
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvferry.cli import health as command
from kvferry.cluster.server import start_server
from kvferry.errors import ConfigError, FerryError, StoreUnavailableError


def _health(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    command.register(app)
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, FerryError):
        raise result.exception
    return result.exit_code, result.stdout


async def test_a_server_is_asked_over_tcp_and_over_its_socket(tmp_path: Path) -> None:
    socket = tmp_path / "n.sock"
    server = await start_server([], ["127.0.0.1:0", f"unix:{socket}"])
    try:
        for address in (server.addresses[0], f"unix:{socket}", str(socket)):
            assert await asyncio.to_thread(_health, address) == (0, f"{address}: SERVING\n")
        address = server.addresses[0]
        status, out = await asyncio.to_thread(_health, address, "--service", "nobody")
        assert (status, out) == (1, f"{address}: SERVICE_UNKNOWN\n")
        await server.set_serving(False)
        status, out = await asyncio.to_thread(_health, address, "--json", "-")
        assert status == 1
        assert json.loads(out)["state"] == "NOT_SERVING"
    finally:
        await server.stop(0)


def test_nobody_there_and_no_address_are_told_apart() -> None:
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        _health("127.0.0.1:1")
    with pytest.raises(ConfigError, match="HOST:PORT"):
        _health("nowhere")
