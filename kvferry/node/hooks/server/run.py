"""Run mlx-lm's server with kvferry behind its prompt cache."""

import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from kvferry.codec.mlx import smollm2
from kvferry.errors import FerryError, ModelError
from kvferry.node.client import NodeClient
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.server.bridge import Bridge
from kvferry.node.hooks.server.checks import cache_problem, loading_problem
from kvferry.node.hooks.server.patch import Patch

log = logging.getLogger(__name__)

PROGRAM = "kvferry serve"
GREETING_TIMEOUT_S = 2.0


def serve(arguments: Sequence[str], options: HookOptions) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; then hand over what is still to be stored.

    For the main thread of a process: signals and ``sys.argv`` are its.

    Args:
        arguments: mlx_lm.server's own.
        options: where the node daemon is, and how long things may take.
    Returns: what was served and restored: "seconds", "rank" and counters.
    Raises:
        FerryError: the model cannot be loaded, or the address cannot be listened on.
        SystemExit: arguments that mlx_lm.server refuses.
    """
    from mlx_lm import server

    started = time.monotonic()
    bridge = _bridge(server, options)
    unloadable = loading_problem(server)
    if unloadable and smollm2.NAME in arguments:
        raise ModelError(f"{smollm2.NAME} cannot be given to this mlx-lm: {unloadable}")
    if unloadable:
        say(f"models are loaded as mlx-lm does, stored caches are not used: {unloadable}")
    _make_hub_folder()
    with _arguments(arguments), _stop_signals():
        if unloadable:
            _main(server)
        else:
            _run(server, bridge)
    counters = dict(sorted(bridge.counters.items())) if bridge is not None else {}
    seconds = time.monotonic() - started
    return {"seconds": seconds, "rank": mx.distributed.init().rank(), "counters": counters}


def say(line: str) -> None:
    """One line for whoever started us."""
    sys.stderr.write(f"kvferry: {line}\n")
    sys.stderr.flush()


def _bridge(server: Any, options: HookOptions) -> Bridge | None:
    """None, and a line that says why, where the server has to run without."""
    from mlx_lm import __version__

    if problem := cache_problem(server):
        say(f"mlx-lm {__version__} is not as we know it, served without stored caches: {problem}")
        return None
    try:
        with NodeClient(options.socket, timeout_s=GREETING_TIMEOUT_S) as client:
            client.hello()
    except FerryError:
        say(
            f"no node daemon answers at {options.socket}: caches are neither stored nor restored "
            "until it does; start one with `kvferry up` (one machine) or `kvferry node`"
        )
    return Bridge(options)


def _make_hub_folder() -> None:
    """Where nothing was downloaded yet, mlx-lm's list of models fails for want of it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with suppress(OSError):
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)


def _run(server: Any, bridge: Bridge | None) -> None:
    with Patch(server, bridge).installed() as running:
        try:
            _main(server)
        except KeyboardInterrupt:
            pass
        except OSError as exc:
            raise FerryError(f"the server cannot listen: {exc}; see --host and --port") from exc
        finally:
            running.stop()
    if running.failure is not None:
        raise ModelError(_one_line(running.failure)) from running.failure


def _main(server: Any) -> None:
    server.main()


def _one_line(problem: Exception) -> str:
    text = str(problem).strip() or type(problem).__name__
    return f"the model cannot be loaded: {' '.join(text.split())}"


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [PROGRAM, *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM stops the server as SIGINT does, also where a shell had that one ignored."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
