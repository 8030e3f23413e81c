"""``kvferry calibrate --codec lowrank``: a basis for every head of a model."""

from pathlib import Path

import typer

from kvferry.cli.calibrate_kvtc import codec_folder
from kvferry.cli.interrupt import interruptible, stop_signals
from kvferry.cli.output import write_json


def calibrate_lowrank(
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
    """Fit bases, and write them beside the default codec's calibration.

    Args: limit: bytes that it may take beyond what it holds; None: what is free.
    """
    import time

    from kvferry.codec.lab.checkpoint import Checkpoint, checkpoint_key
    from kvferry.codec.lab.lowrank import (
        LowRankPlan,
        calibrate,
        calibration_set,
        check_streams,
    )
    from kvferry.codec.lab.memory import free_memory, lowrank_memory_need, peak_memory
    from kvferry.codec.lab.text import calibration_text, first_tokens
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.probe import describe
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.node.calibrations import calibration_folder
    from kvferry.places import user_dir
    from kvferry.proto.identity import model_id

    started = time.monotonic()
    plan = LowRankPlan() if tokens is None else LowRankPlan(tokens=tokens)
    content = calibration_text(text)
    with stop_signals() as stopping:
        loaded = load_model(model)
        identity = model_id(fingerprint(loaded))
        folder = out or codec_folder(identity, "lowrank")
        if if_missing and _fits(folder, identity):
            typer.echo(f"calibration of {model} for lowrank is there already: {folder}", err=True)
            if json is not None:
                write_json({"model": model, "folder": str(folder), "made": False}, json)
            return
        shape = describe(loaded.model, loaded.config)
        check_streams(shape)
        what = f"the text to calibrate on ({content.source})"
        given = first_tokens(loaded.tokenizer, content.fitted, plan.tokens, what)
        need = lowrank_memory_need(loaded, shape, plan)
        typer.echo(need.line(), err=True)
        free = free_memory() if limit is None else limit
        need.check(free)
        unfinished = calibration_folder(user_dir("cache"), identity).with_suffix(".unfinished")
        kept = Checkpoint(unfinished, checkpoint_key(identity, given, [], plan))
        if restart:
            kept.clear()
        title = f"calibrating {model} for lowrank"
        with interruptible(title, plan.tokens, kept.folder, stopping) as report:
            known = calibrate(loaded, identity, given, content.source, plan, report, kept)
    made = calibration_set(known)
    made.save(folder, [known])
    for old in folder.glob("*.kvferry"):
        if old.stem != known.id.hex():
            old.unlink(missing_ok=True)
    kept.clear()
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    empty = {name: int(flags.sum()) for name, flags in known.nulls.items()}
    lost = {
        name: {str(rank): float(basis.lost(rank).mean()) for rank in _ranks(basis.dim)}
        for name, basis in known.bases.items()
    }
    if json is not None:
        memory = {**need.to_json(), "free_bytes": free, "peak_bytes": peak_memory()}
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "codec": "lowrank",
                "calibration_id": made.id.hex(),
                "group_id": known.id.hex(),
                "folder": str(folder),
                "made": True,
                "tokens": plan.tokens,
                "text_source": content.source,
                "norm": known.norm,
                "empty_directions": empty,
                "lost_variance": lost,
                "bytes": size,
                "memory": memory,
                "seconds": seconds,
            },
            json,
        )
    if json != "-":
        for name, shares in sorted(lost.items(), reverse=True):
            told = ", ".join(f"{rank}: {100 * share:.2f} %" for rank, share in shares.items())
            typer.echo(f"  variance of {name} that a rank leaves out, mean of heads: {told}")
        typer.echo(f"  norm before attention: {known.norm}; empty directions: {empty or 'none'}")
        typer.echo(f"{folder}: {size / 1e6:.1f} MB, {seconds:.0f} s")


def _ranks(dim: int) -> list[int]:
    """Some that are common: 60, 56, 48 and 32 of 64."""
    return sorted({max(1, dim * share // 16) for share in (15, 14, 12, 8)}, reverse=True)


def _fits(folder: Path, identity: bytes) -> bool:
    """Whether a calibration of the model is there and can be read."""
    from kvferry.codec.calibration import CalibrationSet
    from kvferry.codec.lowrank_calibration import LowRankCalibration
    from kvferry.errors import CodecError, ConfigError

    try:
        found, groups = CalibrationSet.load(folder)
    except (CodecError, ConfigError):
        return False
    return found.model_id == identity and isinstance(groups[0], LowRankCalibration)
