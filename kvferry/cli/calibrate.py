"""``kvferry calibrate``: learn what a codec needs to know about a model."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.options import ModelOption
from kvferry.cli.output import JsonOption


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(calibrate)


def calibrate(
    model: ModelOption = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Text to learn from; of several, in turn. Default: Python's docs."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. Default: the user's cache.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of text to fit on. Default: 16384, of lowrank 8192."),
    ] = None,
    codec: Annotated[
        str,
        typer.Option(help="ferry; kvtc: the published codec, to compare with; lowrank."),
    ] = "ferry",
    weights: Annotated[
        str, typer.Option(help="fisher, or identity (faster, larger blobs). For ferry only.")
    ] = "fisher",
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Do nothing where there is one already.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Do not go on from an interrupted run.")
    ] = False,
    memory_limit: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="May take so much more memory. Default: what is free."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Calibrate a model for a codec: a minute or two, once per model.

    Ctrl-C stops it within seconds; the same command goes on from there.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()

    from kvferry.cli.calibrate_ferry import FerryPart
    from kvferry.cli.calibrate_kvtc import KvtcPart
    from kvferry.cli.calibrate_lowrank import LowRankPart
    from kvferry.cli.calibrate_run import Asked, run
    from kvferry.codec.lab.memory import GIB
    from kvferry.errors import ConfigError

    if codec not in ("ferry", "kvtc", "lowrank"):
        raise ConfigError("codec", codec, "ferry, kvtc or lowrank; others need no calibration")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError("memory-limit", memory_limit, "a number of GiB above 0")
    asked = Asked(
        model=model,
        text=text or [],
        out=out,
        json=json,
        if_missing=if_missing,
        restart=restart,
        limit=None if memory_limit is None else int(memory_limit * GIB),
    )
    if codec == "kvtc":
        run(KvtcPart(tokens), asked)
    elif codec == "lowrank":
        run(LowRankPart(tokens), asked)
    elif weights in ("fisher", "identity"):
        run(FerryPart(tokens, fisher=weights == "fisher"), asked)
    else:
        raise ConfigError("weights", weights, "fisher or identity")
