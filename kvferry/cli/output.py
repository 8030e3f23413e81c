"""How commands speak: JSON for programs, bars for terminals, plain lines elsewhere."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import typer

from kvferry.cli.lab_input import check_output
from kvferry.errors import ConfigError


def _check_json(target: str | None) -> str | None:
    """Before any work is done, in every command. Raises: ConfigError."""
    if target not in (None, "-"):
        check_output("--json", Path(str(target)))
    return target


JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write one JSON object to FILE (-: stdout).",
        callback=_check_json,
    ),
]


def write_json(value: Mapping[str, object], target: str) -> None:
    """One JSON object to a file, or to standard output for ``-``. Raises: ConfigError."""
    text = json.dumps(value, indent=2, allow_nan=False, default=str)
    if target == "-":
        sys.stdout.write(text + "\n")
        return
    try:
        Path(target).write_text(text + "\n")
    except OSError as exc:
        raise ConfigError("--json", target, f"a file to write ({exc.strerror})") from exc


class Bar(Protocol):
    """A task in progress."""

    def update(self, done: float, note: str = "") -> None:
        """``done`` of the total, in the total's unit."""


class _RichBar:
    def __init__(self, progress: "object", task: int) -> None:
        self._progress, self._task = progress, task

    def update(self, done: float, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=note)  # type: ignore[attr-defined]


class _PlainBar:
    """A line each tenth of the way, and at least two seconds apart."""

    def __init__(self, title: str, total: float) -> None:
        self._title, self._total = title, total
        self._last_share, self._last_time = 0.0, time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        share = done / self._total if self._total else 1.0
        now = time.monotonic()
        due = share - self._last_share >= 0.1 and now - self._last_time >= 2.0
        if due or (share >= 1.0 > self._last_share):
            self._last_share, self._last_time = share, now
            sys.stderr.write(f"{self._title}: {share:.0%} {note}".rstrip() + "\n")
            sys.stderr.flush()


@contextmanager
def progress(title: str, total: float) -> Iterator[Bar]:
    """A progress bar on a terminal (standard error), plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _PlainBar(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _RichBar(bars, bars.add_task(title, total=total, note=""))
