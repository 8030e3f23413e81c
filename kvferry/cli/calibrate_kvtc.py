"""``kvferry calibrate --codec kvtc``: what the published codec needs to know."""

from pathlib import Path

import typer

from kvferry.cli.output import progress, write_json


def calibrate_kvtc(
    model: str,
    text: list[Path],
    out: Path | None,
    tokens: int | None,
    if_missing: bool,
    json: str | None,
) -> None:
    """Fit bases and plans, and write them beside the default codec's calibration."""
    import time

    from kvferry.codec.lab.held import held_texts
    from kvferry.codec.lab.kvtc import APART_TOKENS, DEFAULT_TOKENS, calibrate, calibration_work
    from kvferry.codec.lab.text import calibration_text, first_tokens, held_text
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.proto.identity import model_id

    started = time.monotonic()
    count = DEFAULT_TOKENS if tokens is None else tokens
    content = calibration_text(text)
    loaded = load_model(model)
    identity = model_id(fingerprint(loaded))
    folder = out or kvtc_folder(identity)
    if if_missing and _fits(folder, identity):
        typer.echo(f"calibration of {model} for kvtc is there already: {folder}", err=True)
        if json is not None:
            write_json({"model": model, "folder": str(folder), "made": False}, json)
        return
    what = f"the text to calibrate on ({content.source})"
    given = first_tokens(loaded.tokenizer, content.fitted, count, what)
    texts = held_texts(loaded.tokenizer, APART_TOKENS, held_text())
    apart = [found.tokens for found in texts]
    work = calibration_work(count + sum(map(len, apart)))
    with progress(f"calibrating {model} for kvtc", work) as bar:
        known = calibrate(loaded, identity, given, content.source, bar.update, apart)
    made = known.save(folder)
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if json is not None:
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "codec": "kvtc",
                "calibration_id": made.id.hex(),
                "folder": str(folder),
                "made": True,
                "tokens": count,
                "text_source": content.source,
                "rank": {name: bundle.rank for name, bundle in known.bundles.items()},
                "bytes": size,
                "seconds": seconds,
            },
            json,
        )
    if json != "-":
        typer.echo(f"{folder}: {size / 1e6:.0f} MB, {seconds:.0f} s")


def kvtc_folder(identity: bytes) -> Path:
    """Where a model's calibration for kvtc lies unless the user says otherwise."""
    from kvferry.node.calibrations import calibration_folder
    from kvferry.settings import user_dir

    return calibration_folder(user_dir("cache"), identity) / "kvtc"


def _fits(folder: Path, identity: bytes) -> bool:
    """Whether a calibration of the model is there and can be read."""
    from kvferry.codec.kvtc_calibration import KvtcCalibration
    from kvferry.errors import CodecError, ConfigError

    try:
        found, _ = KvtcCalibration.load(folder)
    except (CodecError, ConfigError):
        return False
    return found.model_id == identity
