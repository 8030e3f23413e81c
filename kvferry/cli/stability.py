"""``kvferry stability``: how much a codec's figures vary from text to text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.options import CalibrationOption, ContextOption, ContinuationOption, ModelOption
from kvferry.cli.output import JsonOption, progress, write_json

if TYPE_CHECKING:
    from kvferry.codec.lab.stability import Spread


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(stability)


def stability(
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="Text to measure on; repeat.")],
    model: ModelOption = "smollm2",
    codec: Annotated[str | None, typer.Option(help="As of `kvferry eval`.")] = None,
    opt: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Option of the codec.")
    ] = None,
    preset: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Codec and options as `kvferry tune` found them."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=64, help="Places in each text.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the places.")] = 0,
    calibration: CalibrationOption = None,
    context: ContextOption = 1024,
    continuation: ContinuationOption = 256,
    json: JsonOption = None,
) -> None:
    """Measure one setting on several places of several texts: mean and spread.

    Each run takes CONTEXT + 129 + CONTINUATION tokens; runs of a text do not overlap.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.cli.evaluate import chosen
    from kvferry.codec.lab.evaluate import Setup, evaluate
    from kvferry.codec.lab.machine import load_average, machine
    from kvferry.codec.lab.stability import METRICS, places, spreads
    from kvferry.codec.lab.text import read_text

    choice = chosen(codec, opt or [], preset)
    Setup(codec=choice.codec, context=context, continuation=continuation)
    names = given.text_names(text)
    contents = dict(zip(names, map(read_text, text), strict=True))
    loaded, identity = given.open_model(model)
    known = given.calibration_of(choice.codec, calibration or choice.calibration, identity)
    choice.check(identity, known.id)
    setup = Setup(
        codec=choice.codec,
        options=choice.options,
        context=context,
        continuation=continuation,
        groups=known.groups,
        curve=known.curve,
    )
    parts = []
    for name, content in contents.items():
        tokens = loaded.tokenizer.encode(content)
        for start in places(len(tokens), setup.text_tokens, runs, seed, name):
            parts.append((name, start, tokens[start : start + setup.text_tokens]))
    each = setup.text_tokens + continuation
    total, results, told = 0, [], []
    with progress(f"measuring {choice.codec}", len(parts) * each) as bar:
        for name, start, part in parts:

            def done(count: int, note: str = name) -> None:
                nonlocal total
                total += count
                bar.update(total, note)

            found = evaluate(loaded, identity, part, setup, done)
            results.append(found)
            numbers = {metric: of(found) for metric, of in METRICS.items()}
            told.append({"text": name, "start": start, **numbers})
    overall = spreads(results)
    by_text = {
        name: spreads([r for r, (of, _, _) in zip(results, parts, strict=True) if of == name])
        for name in names
    }
    if json is not None:
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "codec": choice.codec,
                "options": dict(choice.options),
                "calibration_id": known.id.hex(),
                "context_tokens": context,
                "continuation_tokens": continuation,
                "seed": seed,
                "runs": told,
                "overall": {metric: found.to_json() for metric, found in overall.items()},
                "texts": {
                    name: {metric: found.to_json() for metric, found in spread.items()}
                    for name, spread in by_text.items()
                },
                "machine": machine(),
                "load": load_average(),
            },
            json,
        )
    if json != "-":
        for name, figures in [*by_text.items(), (f"all {len(results)} runs", overall)]:
            typer.echo(f"{name}: {_line(figures)}")


def _line(found: "dict[str, Spread]") -> str:
    ratio, kl, growth = (found[n] for n in ("compression_ratio", "kl_mean", "ppl_delta_pct"))
    return (
        f"{ratio.mean:.2f}x, KL {kl.mean:.5f} +- {kl.deviation:.5f}, perplexity "
        f"{growth.mean:+.2f} +- {growth.deviation:.2f} % ({growth.lowest:+.2f} to "
        f"{growth.highest:+.2f})"
    )
