"""``kvferry serve``: mlx-lm's own server, with prompt caches that survive it."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.output import JsonOption, write_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=settings, options_metavar="[OPTIONS] [MLX-LM'S OPTIONS]")(serve)


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="smollm2, a folder, or a hub id that mlx-lm takes.")
    ] = None,
    socket: Annotated[
        Path | None, typer.Option(help="Unix socket of this machine's node daemon.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Run mlx_lm.server, an OpenAI-compatible server, with stored prompt caches.

    All other arguments go to it as they are (--host, --port, --max-tokens, ...); `kvferry serve
    -- --help` lists them. A prompt that this or another machine has seen is restored from the
    node daemon and the store behind it (`kvferry up`, or `kvferry node`) instead of being
    prefilled, after a restart too. Whatever goes wrong with that is a miss, and the model
    prefills. --json tells at the end what was served and restored; of several ranks
    (`mlx.launch ... kvferry serve ...`), the first does.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.node.hooks.options import HookOptions
    from kvferry.node.hooks.server.run import serve as run

    arguments = list(context.args)
    if model is not None:
        arguments = ["--model", model, *arguments]
    result = run(arguments, HookOptions() if socket is None else HookOptions(socket=socket))
    if json is not None and result["rank"] == 0:  # ranks may share a folder
        write_json(result, json)
