"""``kvferry presets``: what a model's cache holds."""

import typer

from kvferry.cli.options import ModelOption
from kvferry.cli.output import JsonOption, write_json
from kvferry.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(presets)


def presets(model: ModelOption, json: JsonOption = None) -> None:
    """Show what a model's cache holds: layers, heads, dims, streams, RoPE, bytes.

    All of it is read off the model and its class in mlx-lm: nothing has to be given to
    `kvferry dump`, `calibrate` or `eval`. No weights are computed; a folder with a
    config.json is enough, and of a hub id no more is fetched. Element types are those
    that the model has on this machine: on a CPU everything is float32.
    """
    from kvferry.codec.mlx.load import load_lazily
    from kvferry.codec.mlx.preset_report import FAMILIES, report_on

    if model.lower() in FAMILIES:
        allowed = f"a folder or hub id: {model} is a family, whose models differ"
        raise ConfigError("--model", model, allowed)
    live, config = load_lazily(model)
    found = report_on(live, config)
    from kvferry.cli.preset_screen import as_json, print_preset

    if json is not None:
        write_json(as_json(model, live is not None, found), json)
    if json != "-":
        print_preset(model, live is not None, found)
