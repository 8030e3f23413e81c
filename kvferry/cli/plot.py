"""``kvferry plot``: what codecs cost and what layers matter, as PNG."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.options import CalibrationOption, ContextOption, ContinuationOption, ModelOption
from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import ConfigError

plot_app = typer.Typer(help="Draw measurements as PNG (needs matplotlib).", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option(metavar="FILE.png", help="Where to draw.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(plot_app, name="plot")


@plot_app.command()
def rate(
    model: ModelOption,
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="Text to measure on; repeat.")],
    out: OutOption,
    codec: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Codec; repeat. Default: all that lose something."),
    ] = None,
    points: Annotated[int, typer.Option(min=1, max=16, help="Settings per codec.")] = 5,
    calibration: CalibrationOption = None,
    context: ContextOption = 2048,
    continuation: ContinuationOption = 512,
    json: JsonOption = None,
) -> None:
    """Compression ratio against KL, a line per codec, all measured.

    Each text is read once; every codec is then measured at some of its
    settings on each of them. The line goes through the medians over the
    texts, the band is their spread.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.codec.lab.evaluate import Setup, prepare
    from kvferry.codec.lab.knobs import knob_of
    from kvferry.codec.lab.plot_rate import Measured, draw_rate, rate_points, spread_out
    from kvferry.codec.lab.plot_style import check_matplotlib
    from kvferry.codec.lab.text import first_tokens, read_text
    from kvferry.codec.registry import codec_names

    # Mistakes are refused before the model is loaded.
    check_matplotlib()
    given.check_output("--out", out, (".png",))
    names = list(dict.fromkeys(codec or [n for n in LOSSY if n in codec_names()]))
    for name in names:
        given.check_codec(name)
        knob_of(name)
    sizes = Setup(codec="", context=context, continuation=continuation)
    labels = given.text_names(text)
    contents = dict(zip(labels, map(read_text, text), strict=True))
    loaded, identity = given.open_model(model)
    codecs = []
    for name in names:
        try:
            known = given.calibration_of(name, calibration, identity)
        except ConfigError as exc:
            if codec:
                raise
            typer.echo(f"kvferry: {name} is left out: {exc}", err=True)
            continue
        codecs.append(Measured(knob_of(name, known.groups), known.groups, known.curve))
    tokens = {
        label: first_tokens(loaded.tokenizer, content, sizes.text_tokens, label)
        for label, content in contents.items()
    }
    settings = sum(len(spread_out(codec.knob.settings, points)) for codec in codecs)
    work = len(tokens) * (sizes.text_tokens + settings * continuation)
    total, doing = 0, "reading"

    with progress(f"measuring {model}", work) as bar:

        def done(count: int) -> None:
            nonlocal total
            total += count
            bar.update(total, doing)

        def note(what: str) -> None:
            nonlocal doing
            doing = what

        texts = {
            label: prepare(loaded, identity, part, context, continuation, done)
            for label, part in tokens.items()
        }
        found = rate_points(texts, codecs, points, done, note)
        bar.update(work)
    below = f"{context:,} tokens coded, {continuation} predicted; down and right is better"
    below += f"\non {', '.join(labels)}" if len(labels) <= 4 else f"\non {len(labels)} texts"
    size = draw_rate(found, f"{model}: bytes against fidelity of the KV cache", below, out)
    if json is not None:
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "file": str(out),
                "bytes": size,
                "context_tokens": context,
                "continuation_tokens": continuation,
                "points": [point.to_json() for point in found],
            },
            json,
        )
    if json != "-":
        typer.echo(f"{out}: {len(found)} points, {size / 1e3:.0f} kB")


@plot_app.command()
def layers(
    model: ModelOption,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to measure on.")],
    out: OutOption,
    measure: Annotated[
        bool, typer.Option(help="Also code each layer alone and run the model: slower.")
    ] = True,
    calibration: CalibrationOption = None,
    context: Annotated[int, typer.Option(help="Tokens that are coded.")] = 1024,
    continuation: ContinuationOption = 128,
    json: JsonOption = None,
) -> None:
    """Which layers and heads matter: heat maps, and layers coded one by one.

    The heat maps show the KL that the calibration's Fisher weights predict
    when a head's values are off by a tenth. Below, what one layer's K or V
    costs when it alone is coded in 3 bits: predicted, and measured.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.codec.lab.evaluate import Setup, prepare
    from kvferry.codec.lab.plot_layers import draw_layers, layer_map
    from kvferry.codec.lab.plot_style import check_matplotlib
    from kvferry.codec.lab.text import first_tokens, read_text

    check_matplotlib()
    given.check_output("--out", out, (".png",))
    sizes = Setup(codec="", context=context, continuation=continuation)
    content = read_text(text)
    loaded, identity = given.open_model(model)
    known = given.calibration_of("ferry", calibration, identity)
    tokens = first_tokens(loaded.tokenizer, content, sizes.text_tokens, str(text))
    streams = 2 * len(loaded.model.layers) if measure else 0
    work = sizes.text_tokens + streams * continuation
    total = 0

    with progress(f"measuring {model}", work) as bar:

        def done(count: int) -> None:
            nonlocal total
            total += count
            bar.update(total, "reading")

        prepared = prepare(loaded, identity, tokens, context, continuation, done)
        found = layer_map(
            prepared,
            known.groups,
            measured=measure,
            report=lambda run, doing: bar.update(sizes.text_tokens + run, doing),
        )
        bar.update(work)
    below = (
        f"{context:,} tokens of {text.name}; above: predicted by Fisher weights for each head, "
        f"below: one layer of K or V at a time"
    )
    size = draw_layers(found, f"{model}: which layers and heads of the cache matter", below, out)
    if json is not None:
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "calibration_id": known.id.hex(),
                "file": str(out),
                "bytes": size,
                "text": text.name,
                "context_tokens": context,
                "continuation_tokens": continuation,
                **found.to_json(),
            },
            json,
        )
    if json != "-":
        typer.echo(f"{out}: {len(loaded.model.layers)} layers, {size / 1e3:.0f} kB")


LOSSY = ("ferry", "kvtc", "affine")
