"""The ``kvferry`` command. Commands live in modules of this folder, imported when run."""

import importlib
import os
import sys

import typer

from kvferry import __version__
from kvferry.errors import ConfigError, FerryError

# Each has ``register(app)``; what is heavy it imports inside its commands.
COMMAND_MODULES: tuple[str, ...] = (
    "bench",
    "calibrate",
    "certs",
    "coordinator",
    "demo",
    "doctor",
    "drain",
    "dump",
    "evaluate",
    "exo",
    "experiment",
    "explain",
    "health",
    "inspect",
    "migrate",
    "node",
    "pin",
    "plot",
    "policy",
    "presets",
    "prune",
    "quota",
    "serve",
    "stability",
    "status",
    "store",
    "tune",
    "up",
    "verify",
)

app = typer.Typer(
    name="kvferry",
    help="Ship compressed KV caches between machines and restore them sooner than prefill.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: one line for each of our errors; exit code 2 for usage, 1 for failure."""
    # What gRPC's core would print comes to us as errors, said in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for name in COMMAND_MODULES:
        importlib.import_module(f"kvferry.cli.{name}").register(app)
    try:
        app()
    except ConfigError as exc:
        typer.echo(f"kvferry: {exc}", err=True)
        sys.exit(2)
    except FerryError as exc:
        typer.echo(f"kvferry: {exc}", err=True)
        sys.exit(1)
