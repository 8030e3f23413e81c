"""``kvferry demo``: the whole journey on this machine, with real processes and sockets."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.output import JsonOption, write_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    model: Annotated[str, typer.Option(help="smollm2, or what mlx_lm.load takes.")] = "smollm2",
    prompt_tokens: Annotated[
        int, typer.Option(min=600, max=8000, help="Length of the prompt.")
    ] = 1500,
    max_tokens: Annotated[
        int, typer.Option(min=2, max=512, help="Tokens to generate and compare.")
    ] = 64,
    keep: Annotated[
        Path | None, typer.Option(help="Keep stores, logs and policies in this folder.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compress a real model's cache, stop everything, start again, restore it, and compare.

    Starts coordinator, store and two node daemons as processes, and a pipeline of two
    ranks; then again with the layers split differently, and again without the store.
    """
    from kvferry.cli.demo.scenario import DemoPlan, run_demo
    from kvferry.cli.demo.table import print_table

    plan = DemoPlan(model=model, prompt_tokens=prompt_tokens, max_tokens=max_tokens, keep=keep)
    result = run_demo(plan)
    if json_file is None:
        print_table(result)
    else:
        write_json(result, json_file)
