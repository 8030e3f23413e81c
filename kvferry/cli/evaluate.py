"""``kvferry eval``: any codec on any model and text, measured the same way."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.cli.options import CalibrationOption, ContextOption, ContinuationOption, ModelOption
from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import CalibrationMissingError, ConfigError

if TYPE_CHECKING:
    from kvferry.codec.lab.preset import Preset

DEFAULT_CODEC = "ferry"
CODEC_NAMES = "raw, zstd, affine, bitpack, centroid, ferry, kvtc, lowrank, streaming or random"
DEFAULT_OPTIONS = {"ferry": {"target_kl": "0.005"}, "kvtc": {"ratio": "8"}}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="eval")(evaluate)


def evaluate(
    model: ModelOption,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to measure on.")],
    codec: Annotated[
        str | None,
        typer.Option(help=f"{CODEC_NAMES}. Default: {DEFAULT_CODEC}."),
    ] = None,
    opt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="K=V",
            help="Option of the codec (ferry: target_kl or step; kvtc: ratio, entropy; "
            "zstd: level; affine: bits; bitpack: bits, page_size_kb; centroid: ratio or "
            "similarity, window, persistence, min_merge, init_preserve, flush; lowrank: policy, "
            "rank, target, bits, identity, ln_nullspace, or preset; streaming: ratio or window, "
            "sinks; random: ratio or keep, sinks, seed; both: positions, contiguous or original).",
        ),
    ] = None,
    preset: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Codec and options as `kvferry tune` found them."),
    ] = None,
    calibration: CalibrationOption = None,
    context: ContextOption = 2048,
    continuation: ContinuationOption = 512,
    greedy: Annotated[
        int,
        typer.Option(
            min=0, max=4096, help="Also generate so many tokens, and compare them: slower."
        ),
    ] = 0,
    skip_chars: Annotated[int, typer.Option(min=0, help="Start so far into the text.")] = 0,
    json: JsonOption = None,
) -> None:
    """Measure a codec: bytes shipped, and KL of the model's next-token distributions."""
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.codec.lab.evaluate import Setup, coder_of, measure, prepare
    from kvferry.codec.lab.spoken import exact_pages, spoken, words
    from kvferry.codec.lab.text import first_tokens, read_text
    from kvferry.codec.mlx.probe import describe

    # Mistakes are refused before the model is loaded.
    choice = chosen(codec, opt or [], preset)
    codec, options = choice.codec, choice.options
    Setup(codec=codec, context=context, continuation=continuation)
    content = read_text(text)[skip_chars:]
    loaded, identity = given.open_model(model)
    known = given.calibration_of(codec, calibration or choice.calibration, identity)
    choice.check(identity, known.id)
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

    with progress(f"evaluating {codec}", len(tokens) + continuation + 2 * greedy) as bar:

        def done(count: int) -> None:
            nonlocal total
            total += count
            bar.update(total)

        coder_of(identity, describe(loaded.model, loaded.config), setup)  # or refused at once
        prepared = prepare(loaded, identity, tokens, context, continuation, done)
        found = measure(prepared, setup, done)
        result = found.to_json(model)
        if greedy:
            pages = [*found.pages.pages, *found.tail.pages]
            exact = words(prepared, exact_pages(prepared), greedy, done)
            result |= spoken(exact, words(prepared, pages, greedy, done))
    if json is not None:
        write_json(result, json)
    if json != "-":
        typer.echo(described(codec, options, result))


def described(codec: str, options: Mapping[str, object], result: Mapping[str, Any]) -> str:
    """One line for people. Args: result: as ``--json`` has it."""
    greedy = ""
    if "token_match" in result:
        match, count = 100 * result["token_match"], result["greedy_tokens"]
        greedy = f"same {match:.1f} % of {count} greedy tokens, "
    return (
        f"{' '.join([codec, *(f'{k}={v}' for k, v in options.items())])}: "
        f"{result['compression_ratio']:.1f}x ({result['bits_per_value']:.2f} bits/value), "
        f"KL {result['kl_mean']:.5f}, perplexity {result['ppl_delta_pct']:+.2f} %, "
        f"same top-1 {100 * result['top1_agreement']:.1f} %, {greedy}"
        f"encode {result['encode_seconds']:.2f} s, decode {result['decode_seconds']:.2f} s"
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec and its options as a command line gives them.

    Attributes:
        calibration: folder that a preset names; None: the usual one.
        preset: what they come from, and its file.
    """

    codec: str
    options: Mapping[str, object]
    calibration: Path | None = None
    preset: "Preset | None" = None
    file: Path | None = None

    def check(self, model_id: bytes, calibration_id: bytes) -> None:
        """Whether a preset was tuned for these. Raises: ConfigError."""
        if self.preset is not None:
            self.preset.check(model_id, calibration_id, str(self.file))


def chosen(codec: str | None, opt: Sequence[str], preset: Path | None) -> Choice:
    """The codec and its options, checked as far as can be without a calibration.

    Args:
        codec: None: the default, or the preset's.
        preset: codec and options; of lowrank ``--opt preset=FILE`` gives one too.
    Raises: ConfigError.
    """
    from kvferry.codec.lab.preset import load_preset
    from kvferry.codec.lowrank_options import warning
    from kvferry.codec.registry import make_codec

    given = parse_options(list(opt))
    if preset is not None and (codec is not None or given):
        raise ConfigError("--preset", str(preset), "without --codec and --opt, which it gives")
    tuned = None if preset is None else load_preset(preset)
    if (codec == "lowrank" and "preset" in given) or (
        tuned is not None and tuned.codec == "lowrank"
    ):
        choice = _lowrank(given, preset)
    elif tuned is not None:
        choice = Choice(tuned.codec, dict(tuned.options), None, tuned, preset)
    else:
        codec = codec or DEFAULT_CODEC
        choice = Choice(codec, given or dict(DEFAULT_OPTIONS.get(codec, {})))
    with suppress(CalibrationMissingError):
        make_codec(choice.codec, choice.options)
    if choice.codec == "lowrank" and (told := warning(choice.options)):
        typer.echo(f"kvferry: {told}", err=True)
    return choice


def _lowrank(given: Mapping[str, object], preset: Path | None) -> Choice:
    """A preset of lowrank with what else was given instead of its own."""
    from kvferry.codec.lab.lowrank_preset import load

    file = preset or Path(str(given["preset"]))
    found = load(file)
    more = {name: value for name, value in given.items() if name != "preset"}
    if found.preset is None:
        typer.echo(f"kvferry: {file} does not say what it was tuned with: settings only", err=True)
    return Choice("lowrank", {**found.options, **more}, found.calibration, found.preset, file)


def parse_options(given: list[str]) -> dict[str, object]:
    """``k=v`` texts as options. Raises: ConfigError."""
    options: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError("--opt", text, "NAME=VALUE")
        options[name] = value
    return options
