"""Long work that Ctrl-C ends at a good moment, so that the same command goes on from there."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvferry.cli.output import progress

if TYPE_CHECKING:
    from kvferry.codec.lab.plan import Report

INTERRUPTED = 130


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask to stop at the next good moment; a second one stops at once.

    Yields: whether one has come.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(
    title: str, work: float, folder: Path, stopping: Callable[[], bool]
) -> "Iterator[Report]":
    """A progress bar whose reports end the work where a signal asked for it.

    Args:
        folder: where the work keeps its state.
        stopping: of `stop_signals`.
    Yields: to be called with the work done so far and a note.
    Raises: typer.Exit, after one line that says how to go on.
    """
    from kvferry.codec.lab.plan import Stopped

    with progress(title, work) as bar:

        def report(done: float, note: str) -> None:
            bar.update(done, note)
            if stopping():
                raise Stopped

        try:
            yield report
            return
        except (Stopped, KeyboardInterrupt):
            pass
    typer.echo(
        f"kvferry: interrupted; the same command goes on from here ({folder}), "
        "with --restart it starts afresh",
        err=True,
    )
    raise typer.Exit(INTERRUPTED)
