"""``kvferry exo``: exo with kvferry's prefix cache."""

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=settings, options_metavar="-- [EXO'S OPTIONS]")(exo)


def exo(context: typer.Context) -> None:
    """Run exo with prompts that this or another machine has seen restored, not prefilled.

    Use it in exo's place on every machine: `kvferry exo -- ARGS` takes exo's own arguments.
    exo must run from its source, and kvferry be installed into its environment. Prompts go to
    this machine's node daemon (`kvferry node`); whatever goes wrong with that is a miss, and
    the model prefills. If exo has changed so that kvferry does not fit, or another machine of
    the same model runs plain exo, one line says so and exo runs as without it.
    """
    from kvferry.node.hooks.exo.launch import run

    run(context.args)
