"""``kvferry tune``: the smallest blobs that stay within a bound."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.options import CalibrationOption, ContextOption, ContinuationOption, ModelOption
from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from kvferry.cli.lab_input import Known
    from kvferry.codec.calibration import GroupCalibration
    from kvferry.codec.lab.knobs import Knob
    from kvferry.codec.lab.preset import Preset
    from kvferry.codec.lab.tune import Bound, Trial, Tuned
    from kvferry.codec.mlx.load import LoadedModel


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tune)


def tune(
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="Where to write the preset.")],
    model: ModelOption = "smollm2",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text to hold the bound on; repeat. Default: source, prose and chat of Python's.",
        ),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="Bound on the mean KL, e.g. 0.01.")
    ] = None,
    max_ppl_delta: Annotated[
        float | None,
        typer.Option(metavar="PCT", help="Or: bound on the growth of perplexity in per cent."),
    ] = None,
    target_ppl_delta: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="The same as a share: 0.05 is 5 per cent."),
    ] = None,
    codec: Annotated[str, typer.Option(help="As of `kvferry eval`.")] = "ferry",
    target: Annotated[
        str | None, typer.Option(help="lowrank: v (default), k or kv, to be measured with care.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="N,N", help="lowrank: ranks to try, as 60,56,48.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="N,N", help="lowrank: bits to try. Default: 16,8.")
    ] = None,
    calibration: CalibrationOption = None,
    context: ContextOption = 2048,
    continuation: ContinuationOption = 512,
    evaluations: Annotated[
        int,
        typer.Option(min=1, max=64, help="To try at most; a codec of few settings has all tried."),
    ] = 8,
    json: JsonOption = None,
) -> None:
    """Find the coarsest setting whose loss stays within a bound on ALL texts.

    Each text is read once and takes CONTEXT + 129 + CONTINUATION tokens.
    Of lowrank every rank is tried with every width, the smallest blobs first.
    The preset holds codec, options, calibration and what was measured.
    `kvferry eval --preset FILE` takes it, and so does a policy: copy its
    codec and options into a rule, as `codec = "ferry"` and
    `options = { step = 0.83 }`. A step holds for its calibration only.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.codec.lab.evaluate import Prepared, Setup, prepare
    from kvferry.codec.lab.preset import Preset
    from kvferry.codec.lab.tune import Tuner

    # Mistakes are refused before the model is loaded.
    bound = _bound(max_kl, max_ppl_delta, target_ppl_delta)
    given.check_codec(codec)
    asked = Asked(codec, target, ranks, bits)
    asked.knob(())
    sizes = Setup(codec=codec, context=context, continuation=continuation)
    given.check_output("--out", out)
    contents = _contents(text or [])
    loaded, identity = given.open_model(model)
    known = given.calibration_of(codec, calibration, identity)
    tokens = _tokens(loaded, contents, sizes.text_tokens)
    work = len(tokens) * (sizes.text_tokens + evaluations * continuation)
    total = 0
    note = "reading"

    with progress(f"tuning {codec}", work) as bar:

        def done(count: int) -> None:
            nonlocal total
            total += count
            bar.update(total, note)

        def report(trial: "Trial") -> None:
            nonlocal note
            note = _shown(trial)

        texts: dict[str, Prepared] = {
            name: prepare(loaded, identity, part, context, continuation, done)
            for name, part in tokens.items()
        }
        tuner = Tuner(
            texts=texts,
            knob=asked.knob(known.groups),
            bound=bound,
            groups=known.groups,
            curve=known.curve,
            budget=evaluations,
            done=done,
            report=report,
        )
        result = tuner.run()
        bar.update(work)
    preset = Preset(
        model=model,
        model_id=identity,
        codec=codec,
        options=result.best.options,
        calibration_id=known.id,
        metric=bound.metric,
        limit=bound.limit,
        context=context,
        continuation=continuation,
        compression_ratio=result.best.ratio,
        measured=result.measured(model),
    )
    written = _save(preset, known, result, out)
    if json is not None:
        write_json({**written, "preset": str(out), "tried": _tried(result)}, json)
    if json != "-":
        for trial in result.trials:
            mark = "*" if trial is result.best else " "
            typer.echo(f"{mark} {_shown(trial)}")
        typer.echo(f"{out}: {preset.compression_ratio:.3g}x on {len(texts)} texts")


@dataclass(frozen=True, slots=True)
class Asked:
    """The codec to tune, and what of it is to be tried, as given."""

    codec: str
    target: str | None
    ranks: str | None
    bits: str | None

    def knob(self, groups: "Sequence[GroupCalibration]") -> "Knob":
        """What is turned. Raises: ConfigError."""
        from kvferry.codec.lab.knobs import knob_of, lowrank_knob
        from kvferry.codec.lowrank_options import warning

        if self.codec != "lowrank":
            for name in ("target", "ranks", "bits"):
                if (value := getattr(self, name)) is not None:
                    raise ConfigError(f"--{name}", value, "left out: it is of --codec lowrank")
            return knob_of(self.codec, groups)
        target = self.target or "v"
        ranks, bits = _numbers("--ranks", self.ranks), _numbers("--bits", self.bits)
        knob = lowrank_knob(groups, ranks, bits or (16, 8), target)
        if not groups and (told := warning({"target": target})):
            typer.echo(f"kvferry: {told}", err=True)
        return knob


def _numbers(option: str, text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as exc:
        raise ConfigError(option, text, "whole numbers with commas, as 60,56,48") from exc


def _bound(max_kl: float | None, percent: float | None, share: float | None) -> "Bound":
    """The one bound that was given. Raises: ConfigError."""
    from kvferry.codec.lab.tune import Bound

    if sum(value is not None for value in (max_kl, percent, share)) != 1:
        allowed = "given, or --max-ppl-delta or --target-ppl-delta, and only one of them"
        raise ConfigError("--max-kl", max_kl, allowed)
    if max_kl is not None:
        return Bound("kl_mean", max_kl)
    if share is None:
        return Bound("ppl_delta_pct", percent or 0.0)
    if not 0 < share < math.inf:
        raise ConfigError("--target-ppl-delta", share, "a number above 0")
    return Bound("ppl_delta_pct", 100 * share)


def _contents(files: list[Path]) -> dict[str, str]:
    from kvferry.cli.lab_input import text_names
    from kvferry.codec.lab.text import read_text

    return dict(zip(text_names(files), map(read_text, files), strict=True))


def _tokens(loaded: "LoadedModel", contents: dict[str, str], count: int) -> dict[str, list[int]]:
    """The first ``count`` of each text; without any those that calibrations are measured on."""
    from kvferry.codec.lab.held import held_texts
    from kvferry.codec.lab.text import first_tokens, held_text

    if not contents:
        held = held_texts(loaded.tokenizer, count, held_text())
        return {text.name: list(text.tokens) for text in held}
    return {
        name: first_tokens(loaded.tokenizer, content, count, name)
        for name, content in contents.items()
    }


def _save(preset: "Preset", known: "Known", result: "Tuned", out: Path) -> dict[str, object]:
    """Write the preset; of lowrank with the fields of its own format. What was written."""
    from kvferry.codec.lab import lowrank_preset
    from kvferry.codec.lab.preset import save_preset
    from kvferry.codec.lowrank_calibration import LowRankCalibration

    group = known.groups[0] if known.groups else None
    if isinstance(group, LowRankCalibration) and known.folder is not None:
        measured = list(result.best.results.values())
        written = lowrank_preset.fields(preset, group, measured, known.folder, out)
        lowrank_preset.save(written, out)
        return written
    save_preset(preset, out)
    return preset.to_json()


def _shown(trial: "Trial") -> str:
    options = " ".join(f"{name}={value}" for name, value in trial.options.items())
    return f"{options or 'exact'}: {trial.ratio:.3g}x, worst {trial.error:.4g}"


def _tried(result: "Tuned") -> list[dict[str, object]]:
    return [
        {
            "options": dict(trial.options),
            "worst": trial.error,
            "compression_ratio": trial.ratio,
            "texts": list(trial.results),
        }
        for trial in result.trials
    ]
