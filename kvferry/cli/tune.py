"""``kvferry tune``: the smallest blobs that stay within a bound."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.options import CalibrationOption, ContextOption, ContinuationOption, ModelOption
from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from kvferry.codec.lab.tune import Trial, Tuned


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tune)


def tune(
    model: ModelOption,
    text: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Text to hold the bound on; repeat.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="Where to write the preset.")],
    max_kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="Bound on the mean KL, e.g. 0.01.")
    ] = None,
    max_ppl_delta: Annotated[
        float | None,
        typer.Option(metavar="PCT", help="Or: bound on the growth of perplexity in per cent."),
    ] = None,
    codec: Annotated[str, typer.Option(help="Codec to tune.")] = "ferry",
    calibration: CalibrationOption = None,
    context: ContextOption = 2048,
    continuation: ContinuationOption = 512,
    evaluations: Annotated[int, typer.Option(min=1, max=64, help="Settings to try at most.")] = 8,
    json: JsonOption = None,
) -> None:
    """Find the coarsest setting whose loss stays within a bound on ALL texts.

    Each text is read once and takes CONTEXT + 129 + CONTINUATION tokens.
    The preset holds codec, options, calibration and what was measured.
    `kvferry eval --preset FILE` takes it, and so does a policy: copy its
    codec and options into a rule, as `codec = "ferry"` and
    `options = { step = 0.83 }`. A step holds for its calibration only.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.codec.lab.evaluate import Prepared, Setup, prepare
    from kvferry.codec.lab.knobs import knob_of
    from kvferry.codec.lab.preset import Preset, save_preset
    from kvferry.codec.lab.text import first_tokens, read_text
    from kvferry.codec.lab.tune import Bound, Tuner

    # Mistakes are refused before the model is loaded.
    if (max_kl is None) == (max_ppl_delta is None):
        raise ConfigError("--max-kl", max_kl, "given, or --max-ppl-delta, and not both")
    bound = (
        Bound("kl_mean", max_kl)
        if max_kl is not None
        else Bound("ppl_delta_pct", max_ppl_delta or 0.0)
    )
    given.check_codec(codec)
    knob_of(codec)
    sizes = Setup(codec=codec, context=context, continuation=continuation)
    given.check_output("--out", out)
    given.check_json(json)
    names = given.text_names(text)
    contents = dict(zip(names, map(read_text, text), strict=True))
    loaded, identity = given.open_model(model)
    known = given.calibration_of(codec, calibration, identity)
    tokens = {
        name: first_tokens(loaded.tokenizer, content, sizes.text_tokens, name)
        for name, content in contents.items()
    }
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
            knob=knob_of(codec, known.groups),
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
    save_preset(preset, out)
    if json is not None:
        write_json({**preset.to_json(), "preset": str(out), "tried": _tried(result)}, json)
    if json != "-":
        for trial in result.trials:
            mark = "*" if trial is result.best else " "
            typer.echo(f"{mark} {_shown(trial)}")
        typer.echo(f"{out}: {preset.compression_ratio:.1f}x on {len(text)} texts")


def _shown(trial: "Trial") -> str:
    options = " ".join(f"{name}={value}" for name, value in trial.options.items())
    return f"{options or 'exact'}: {trial.ratio:.1f}x, worst {trial.error:.4g}"


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
