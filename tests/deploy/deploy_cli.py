"""Command lines against the real command line parser, without running anything."""

import importlib
from collections.abc import Sequence
from typing import Any

import typer

from kvferry.cli.main import COMMAND_MODULES


class BadCommandError(Exception):
    """The parser refuses a command line."""


def parse(arguments: Sequence[str]) -> dict[str, object]:
    """Parameters of a ``kvferry`` command. Raises: BadCommandError."""
    app = typer.Typer()
    for name in COMMAND_MODULES:
        importlib.import_module(f"kvferry.cli.{name}").register(app)
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            raise BadCommandError(f"no command {rest[:1]}")
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        return dict(command.make_context("kvferry", rest).params)
    except Exception as exc:  # the parser's own classes move between releases
        raise BadCommandError(str(exc)) from exc
