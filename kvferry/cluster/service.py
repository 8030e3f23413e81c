"""What every service process does alike: log, announce itself, obey signals, end cleanly."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from kvferry.errors import ConfigError
from kvferry.settings import is_loopback

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A service that is up.

    Attributes:
        addresses: where it serves; the first is announced.
        stop: clean shutdown; loses nothing that was accepted. Called once.
        background: ends only by failing; its failure ends the process, loudly.
        info: further fields of the ready file, JSON values.
    """

    addresses: Sequence[str]
    stop: Callable[[], Awaitable[None]]
    background: "asyncio.Future[None] | None" = None
    info: Mapping[str, object] = field(default_factory=dict)


def setup_logging(level: str = "info") -> None:
    """Plain lines on standard error. Raises: ConfigError for an unknown level."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError("log_level", level, "one of debug, info, warning, error")
    logging.basicConfig(
        level=number, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


@contextlib.contextmanager
def metrics_endpoint(
    listen: str, registry: CollectorRegistry, allow_remote_plaintext: bool = False
) -> Iterator[str]:
    """Serve ``registry`` to Prometheus from a thread of its own.

    Yields HOST:PORT as bound; "" where ``listen`` is empty and nothing is served.
    Raises: ConfigError: an address beyond loopback, or in use.
    """
    if not listen:
        yield ""
        return
    if not (allow_remote_plaintext or is_loopback(listen)):
        raise ConfigError("metrics_listen", listen, "a loopback address (allow_remote_plaintext)")
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, ValueError, OverflowError) as exc:
        raise ConfigError("metrics_listen", listen, "HOST:PORT that is free here") from exc
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write_ready_file(path: Path, value: Mapping[str, object]) -> None:
    """Write JSON so that a reader sees all of it or no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value) + "\n")
    temporary.replace(path)


async def _wait_for_end(running: Running, stopping: asyncio.Event) -> None:
    """Until a signal comes, or the background fails (its error is raised)."""
    stop = asyncio.ensure_future(stopping.wait())
    waited: set[asyncio.Future[Any]] = {stop}
    if running.background is not None:
        waited.add(running.background)
    try:
        done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
    for future in done - {stop}:
        future.result()


async def run_service(
    name: str,
    start: Callable[[], Awaitable[Running]],
    *,
    registry: CollectorRegistry | None = None,
    metrics_listen: str = "",
    allow_remote_plaintext: bool = False,
    ready_file: Path | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Run a service until SIGTERM or SIGINT, then stop it cleanly.

    When ready, prints ``kvferry NAME ready on ADDRESS`` and writes ``ready_file``: JSON
    with "address", "addresses", "metrics", "pid" and the service's own ``info``. A second
    signal during the shutdown ends the process at once.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(130)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    with metrics_endpoint(
        metrics_listen if registry is not None else "",
        registry or CollectorRegistry(),
        allow_remote_plaintext,
    ) as metrics:
        running = await start()
        try:
            if ready_file is not None:
                ready = {
                    **running.info,
                    "address": running.addresses[0],
                    "addresses": list(running.addresses),
                    "metrics": metrics,
                    "pid": os.getpid(),
                }
                await asyncio.to_thread(write_ready_file, ready_file, ready)
            announce(f"kvferry {name} ready on {running.addresses[0]}")
            sys.stdout.flush()
            await _wait_for_end(running, stopping)
            log.info("kvferry %s is stopping", name)
        finally:
            if ready_file is not None:
                await asyncio.to_thread(ready_file.unlink, missing_ok=True)
            await running.stop()
