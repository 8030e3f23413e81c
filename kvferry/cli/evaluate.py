"""``kvferry eval``: any codec on any model and text, measured the same way."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.options import CalibrationOption, ContextOption, ContinuationOption, ModelOption
from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import CalibrationMissingError, ConfigError

DEFAULT_CODEC = "ferry"
DEFAULT_OPTIONS = {"ferry": {"target_kl": "0.005"}, "kvtc": {"ratio": "8"}}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="eval")(evaluate)


def evaluate(
    model: ModelOption,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to measure on.")],
    codec: Annotated[
        str | None,
        typer.Option(
            help="raw, zstd, affine, bitpack, ferry, kvtc, streaming or random. "
            f"Default: {DEFAULT_CODEC}."
        ),
    ] = None,
    opt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="Option of the codec (ferry: target_kl or step; kvtc: ratio, entropy; "
            "affine: bits; bitpack: bits, page_size_kb; streaming: ratio or window, sinks; "
            "random: ratio or keep, sinks, seed; both: positions=contiguous|original).",
        ),
    ] = None,
    preset: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Codec and options as `kvferry tune` found them."),
    ] = None,
    calibration: CalibrationOption = None,
    context: ContextOption = 2048,
    continuation: ContinuationOption = 512,
    skip_chars: Annotated[int, typer.Option(min=0, help="Start so far into the text.")] = 0,
    json: JsonOption = None,
) -> None:
    """Measure a codec: bytes shipped, and KL of the model's next-token distributions."""
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.codec.lab.evaluate import Setup
    from kvferry.codec.lab.evaluate import evaluate as run
    from kvferry.codec.lab.preset import load_preset
    from kvferry.codec.lab.text import first_tokens, read_text
    from kvferry.codec.registry import make_codec

    # Mistakes are refused before the model is loaded.
    tuned = None if preset is None else load_preset(preset)
    if tuned is None:
        codec = codec or DEFAULT_CODEC
        options = parse_options(opt or []) or dict(DEFAULT_OPTIONS.get(codec, {}))
    elif codec is not None or opt:
        raise ConfigError("--preset", str(preset), "without --codec and --opt, which it gives")
    else:
        codec, options = tuned.codec, dict(tuned.options)
    with suppress(CalibrationMissingError):
        make_codec(codec, options)
    Setup(codec=codec, context=context, continuation=continuation)
    content = read_text(text)[skip_chars:]
    loaded, identity = given.open_model(model)
    known = given.calibration_of(codec, calibration, identity)
    if tuned is not None:
        tuned.check(identity, known.id, str(preset))
    setup = Setup(
        codec=codec,
        options=options,
        context=context,
        continuation=continuation,
        groups=known.groups,
        curve=known.curve,
    )
    tokens = first_tokens(loaded.tokenizer, content, setup.text_tokens, str(text))
    total = 0

    with progress(f"evaluating {codec}", len(tokens) + continuation) as bar:

        def done(count: int) -> None:
            nonlocal total
            total += count
            bar.update(total)

        result = run(loaded, identity, tokens, setup, done).to_json(model)
    if json is not None:
        write_json(result, json)
    if json != "-":
        typer.echo(
            f"{codec} {' '.join(f'{k}={v}' for k, v in options.items())}: "
            f"{result['compression_ratio']:.1f}x ({result['bits_per_value']:.2f} bits/value), "
            f"KL {result['kl_mean']:.5f}, perplexity {result['ppl_delta_pct']:+.2f} %, "
            f"same top-1 {100 * float(str(result['top1_agreement'])):.1f} %, "
            f"encode {result['encode_seconds']:.2f} s, decode {result['decode_seconds']:.2f} s"
        )


def parse_options(given: list[str]) -> dict[str, object]:
    """``k=v`` texts as options. Raises: ConfigError."""
    options: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError("--opt", text, "NAME=VALUE")
        options[name] = value
    return options
