"""``kvferry calibrate``: learn what a codec needs to know about a model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.calibrate_kvtc import calibrate_kvtc
from kvferry.cli.calibrate_lowrank import calibrate_lowrank
from kvferry.cli.interrupt import interruptible, stop_signals
from kvferry.cli.options import ModelOption
from kvferry.cli.output import JsonOption, write_json

if TYPE_CHECKING:
    from kvferry.codec.calibration import CalibrationSet, GroupCalibration
    from kvferry.codec.lab.checkpoint import Checkpoint
    from kvferry.codec.lab.plan import HeldText, Plan
    from kvferry.codec.mlx.load import LoadedModel

DEFAULT_TOKENS = 16384


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(calibrate)


def calibrate(
    model: ModelOption = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to learn from; repeat. Default: Python's docs."),
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
    import time

    from kvferry.codec.lab.checkpoint import Checkpoint, checkpoint_key
    from kvferry.codec.lab.memory import GIB, free_memory, memory_need, peak_memory
    from kvferry.codec.lab.plan import Plan
    from kvferry.codec.mlx.load import load_model
    from kvferry.codec.mlx.probe import describe
    from kvferry.codec.mlx.weights import fingerprint
    from kvferry.errors import ConfigError
    from kvferry.node.calibrations import calibration_folder
    from kvferry.places import user_dir
    from kvferry.proto.identity import model_id

    if codec not in ("ferry", "kvtc", "lowrank"):
        raise ConfigError("codec", codec, "ferry, kvtc or lowrank; others need no calibration")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError("memory-limit", memory_limit, "a number of GiB above 0")
    limit = None if memory_limit is None else int(memory_limit * GIB)
    if codec != "ferry":
        others = {"kvtc": calibrate_kvtc, "lowrank": calibrate_lowrank}
        others[codec](
            model,
            text or [],
            out,
            tokens,
            json,
            if_missing=if_missing,
            restart=restart,
            limit=limit,
        )
        return
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    if weights not in ("fisher", "identity"):
        raise ConfigError("weights", weights, "fisher or identity")
    plan = Plan(tokens=tokens) if weights == "fisher" else Plan(tokens=tokens, ridge=None)
    if if_missing and (found := _existing(model, out)) is not None:
        typer.echo(f"calibration of {model} is there already: {found}", err=True)
        if json is not None:
            write_json({"model": model, "folder": str(found), "made": False}, json)
        return
    started = time.monotonic()
    with stop_signals() as stopping:
        loaded = load_model(model)
        given, held, source = _texts(loaded, text or [], plan)
        need = memory_need(loaded, describe(loaded.model, loaded.config), plan)
        typer.echo(need.line(), err=True)
        free = free_memory() if limit is None else limit
        need.check(free)
        identity = model_id(fingerprint(loaded))
        folder = out or calibration_folder(user_dir("cache"), identity)
        unfinished = calibration_folder(user_dir("cache"), identity).with_suffix(".unfinished")
        kept = Checkpoint(unfinished, checkpoint_key(identity, given, held, plan))
        if restart:
            kept.clear()
        seconds: dict[str, float] = {}
        made, groups = _run(loaded, identity, given, held, source, plan, kept, seconds, stopping)
    made.save(folder, groups)
    _remove_stale(folder, {group.id.hex() for group in groups})
    kept.clear()
    seconds["whole"] = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if json is not None:
        about = {"model": model, "folder": str(folder), "bytes": size, "tokens": tokens}
        memory = {**need.to_json(), "free_bytes": free, "peak_bytes": peak_memory()}
        write_json(about | _report(made, seconds, memory), json)
    if json != "-":
        _print(made)
        typer.echo(f"{folder}: {size / 1e6:.0f} MB, {seconds['whole']:.0f} s")


def _texts(
    loaded: "LoadedModel", files: list[Path], plan: "Plan"
) -> "tuple[list[int], list[HeldText], str]":
    """Tokens to fit on, texts to measure on, and where the former come from."""
    from kvferry.codec.lab.held import held_texts
    from kvferry.codec.lab.text import calibration_text, first_tokens, held_text

    content = calibration_text(files)
    what = f"the text to calibrate on ({content.source})"
    count = plan.fitted_tokens + (plan.held_tokens if files else 0)
    tokens = first_tokens(loaded.tokenizer, content.fitted, count, what)
    rest = tokens[plan.fitted_tokens :]
    held = held_texts(loaded.tokenizer, plan.held_tokens, held_text(), rest)
    return tokens[: plan.fitted_tokens], held, content.source


def _run(
    loaded: "LoadedModel",
    identity: bytes,
    tokens: list[int],
    held: "list[HeldText]",
    source: str,
    plan: "Plan",
    kept: "Checkpoint",
    seconds: dict[str, float],
    stopping: Callable[[], bool],
) -> "tuple[CalibrationSet, list[GroupCalibration]]":
    from kvferry.codec.lab.calibrate import calibrate as run

    work = plan.work(len(loaded.model.layers), len(held))
    with interruptible(f"calibrating {loaded.name}", work, kept.folder, stopping) as report:
        return run(
            loaded,
            identity,
            tokens,
            source,
            plan,
            report,
            held=held,
            checkpoint=kept,
            seconds=seconds,
        )


def _report(
    made: "CalibrationSet", seconds: dict[str, float], memory: dict[str, int]
) -> dict[str, object]:
    """What ``--json`` says of a calibration that was made."""
    stored = made.to_json()
    after = {name: spent for name, spent in seconds.items() if name not in ("whole", "capture")}
    return {
        "model_id": made.model_id.hex(),
        "calibration_id": made.id.hex(),
        "made": True,
        "text_source": made.text_source,
        "groups": [list(group.layers) for group in made.groups],
        "seconds": seconds["whole"],
        "step_seconds": seconds,
        "seconds_after_capture": sum(after.values()),
        "seconds_after_passes": sum(after.values()) - after.get("gradients", 0.0),
        "memory": memory,
        "curve": stored["curve"],
        "rate_distortion": stored.get("rate_distortion"),
    }


def _print(made: "CalibrationSet") -> None:
    for point in made.curve:
        ratio = 16 / point.bits_per_value
        typer.echo(f"  {ratio:6.1f}x  KL {point.kl:.4f}  step {point.step:.4g}")
    if made.rates is not None and (held := made.rates.prediction) is not None:
        texts = ", ".join(text.name for text in made.rates.texts)
        typer.echo(
            f"  KL: the highest of {texts}; measured / predicted: "
            f"{held.median:.2f} (median), {held.worst:.2f} (worst)"
        )


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
    from kvferry.places import user_dir
    from kvferry.proto.identity import model_id

    loaded = load_model(model, layers=(0, 1))
    identity = model_id(fingerprint(loaded, (0, len(loaded.model.layers))))
    folder = out or calibration_folder(user_dir("cache"), identity)
    try:
        found, _ = CalibrationSet.load(folder)
    except (CodecError, ConfigError):
        return None
    return folder if found.model_id == identity else None
