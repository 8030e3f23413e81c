"""``kvferry calibrate --codec kvtc``: what the published codec needs to know."""

from pathlib import Path

import typer

from kvferry.cli.interrupt import interruptible, stop_signals
from kvferry.cli.output import write_json


def calibrate_kvtc(
    model: str,
    text: list[Path],
    out: Path | None,
    tokens: int | None,
    json: str | None,
    *,
    if_missing: bool,
    restart: bool,
    limit: int | None,
) -> None:
    """Fit bases and plans, and write them beside the default codec's calibration.

    Args: limit: bytes that it may take beyond what it holds; None: what is free.
    """
    import time

    from kvferry.codec.lab.checkpoint import Checkpoint, checkpoint_key
    from kvferry.codec.lab.held import held_texts
    from kvferry.codec.lab.kvtc import APART_TOKENS, KvtcPlan, calibrate, calibration_work
    from kvferry.codec.lab.memory import free_memory, kvtc_memory_need, peak_memory
    from kvferry.codec.lab.text import calibration_text, first_tokens, held_text
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.probe import describe
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.node.calibrations import calibration_folder
    from kvferry.places import user_dir
    from kvferry.proto.identity import model_id

    started = time.monotonic()
    plan = KvtcPlan() if tokens is None else KvtcPlan(tokens=tokens)
    content = calibration_text(text)
    with stop_signals() as stopping:
        loaded = load_model(model)
        identity = model_id(fingerprint(loaded))
        folder = out or codec_folder(identity, "kvtc")
        if if_missing and _fits(folder, identity):
            typer.echo(f"calibration of {model} for kvtc is there already: {folder}", err=True)
            if json is not None:
                write_json({"model": model, "folder": str(folder), "made": False}, json)
            return
        what = f"the text to calibrate on ({content.source})"
        given = first_tokens(loaded.tokenizer, content.fitted, plan.tokens, what)
        texts = held_texts(loaded.tokenizer, APART_TOKENS, held_text())
        apart = [found.tokens for found in texts]
        shape = describe(loaded.model, loaded.config)
        need = kvtc_memory_need(loaded, shape, plan, apart)
        typer.echo(need.line(), err=True)
        free = free_memory() if limit is None else limit
        need.check(free)
        unfinished = calibration_folder(user_dir("cache"), identity).with_suffix(".unfinished")
        kept = Checkpoint(unfinished, checkpoint_key(identity, given, texts, plan))
        if restart:
            kept.clear()
        work = calibration_work(plan.tokens + sum(map(len, apart)), len(shape.streams))
        with interruptible(f"calibrating {model} for kvtc", work, kept.folder, stopping) as report:
            known = calibrate(loaded, identity, given, content.source, plan, report, apart, kept)
    made = known.save(folder)
    kept.clear()
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if json is not None:
        memory = {**need.to_json(), "free_bytes": free, "peak_bytes": peak_memory()}
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "codec": "kvtc",
                "calibration_id": made.id.hex(),
                "folder": str(folder),
                "made": True,
                "tokens": plan.tokens,
                "text_source": content.source,
                "rank": {name: bundle.rank for name, bundle in known.bundles.items()},
                "bytes": size,
                "memory": memory,
                "seconds": seconds,
            },
            json,
        )
    if json != "-":
        typer.echo(f"{folder}: {size / 1e6:.0f} MB, {seconds:.0f} s")


def codec_folder(identity: bytes, codec: str) -> Path:
    """Where a model's calibration for another codec than ferry lies, unless the user says
    otherwise."""
    from kvferry.node.calibrations import calibration_folder
    from kvferry.places import user_dir

    return calibration_folder(user_dir("cache"), identity) / codec


def _fits(folder: Path, identity: bytes) -> bool:
    """Whether a calibration of the model is there and can be read."""
    from kvferry.codec.kvtc_calibration import KvtcCalibration
    from kvferry.errors import CodecError, ConfigError

    try:
        found, _ = KvtcCalibration.load(folder)
    except (CodecError, ConfigError):
        return False
    return found.model_id == identity
