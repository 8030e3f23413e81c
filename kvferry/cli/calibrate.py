"""``kvferry calibrate``: learn what the default codec needs to know about a model."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.output import JsonOption, progress, write_json

DEFAULT_TOKENS = 8192


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(calibrate)


def calibrate(
    model: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id.")] = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to learn from; repeat. Default: Python's docs."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to. Default: the user's cache.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of text to fit on.")] = DEFAULT_TOKENS,
    weights: Annotated[
        str, typer.Option(help="fisher, or identity (faster, larger blobs).")
    ] = "fisher",
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Do nothing where there is one already.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Calibrate a model for the ferry codec: a minute or two, once per model."""
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    import time

    from kvferry.codec.lab.calibrate import Plan
    from kvferry.codec.lab.calibrate import calibrate as run
    from kvferry.codec.lab.text import calibration_text, calibration_tokens
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.errors import ConfigError
    from kvferry.node.calibrations import calibration_folder
    from kvferry.proto.identity import model_id
    from kvferry.settings import user_dir

    if weights not in ("fisher", "identity"):
        raise ConfigError("weights", weights, "fisher or identity")
    plan = Plan(tokens=tokens) if weights == "fisher" else Plan(tokens=tokens, ridge=None)
    if if_missing and (found := _existing(model, out)) is not None:
        typer.echo(f"calibration of {model} is there already: {found}", err=True)
        if json is not None:
            write_json({"model": model, "folder": str(found), "made": False}, json)
        return
    started = time.monotonic()
    content = calibration_text(text or [])
    loaded = load_model(model)
    given = calibration_tokens(loaded.tokenizer, content, plan.fitted_tokens, plan.held_tokens)
    identity = model_id(fingerprint(loaded))
    with progress(f"calibrating {model}", plan.work(len(loaded.model.layers))) as bar:
        made, groups = run(loaded, identity, given, content.source, plan, bar.update)
    folder = out or calibration_folder(user_dir("cache"), identity)
    made.save(folder, groups)
    _remove_stale(folder, {group.id.hex() for group in groups})
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if json is not None:
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "calibration_id": made.id.hex(),
                "folder": str(folder),
                "made": True,
                "tokens": tokens,
                "text_source": content.source,
                "groups": [list(group.layers) for group in groups],
                "bytes": size,
                "seconds": seconds,
                "curve": made.to_json()["curve"],
            },
            json,
        )
    if json != "-":
        for point in made.curve:
            typer.echo(
                f"  {16 / point.bits_per_value:6.1f}x  KL {point.kl:.4f}  step {point.step:.4g}"
            )
        typer.echo(f"{folder}: {size / 1e6:.0f} MB, {seconds:.0f} s")


def _remove_stale(folder: Path, kept: set[str]) -> None:
    """Groups of the calibration that was here before; its blobs name copies in the store."""
    for file in folder.glob("*.kvferry"):
        if file.stem not in kept:
            file.unlink(missing_ok=True)


def _existing(model: str, out: Path | None) -> Path | None:
    """The folder of a calibration that fits the model and can be read, else None."""
    from kvferry.codec.calibration import CalibrationSet
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.errors import CodecError, ConfigError
    from kvferry.node.calibrations import calibration_folder
    from kvferry.proto.identity import model_id
    from kvferry.settings import user_dir

    loaded = load_model(model, layers=(0, 1))
    identity = model_id(fingerprint(loaded, (0, len(loaded.model.layers))))
    folder = out or calibration_folder(user_dir("cache"), identity)
    try:
        found, _ = CalibrationSet.load(folder)
    except (CodecError, ConfigError):
        return None
    return folder if found.model_id == identity else None
