"""``kvferry dump``: a model's cache as a file."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.options import ModelOption
from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import ConfigError

DEFAULT_CONTEXT = 2048


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(dump)


def dump(
    model: ModelOption,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="FILE.safetensors or FILE.npz to write.")
    ],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file to run the model on.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="STR", help="Or: text to run the model on.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to generate greedily after it; they are kept too.")
    ] = 0,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Tokens of the text to take. Default: all, at most {DEFAULT_CONTEXT}."
        ),
    ] = None,
    undo_rope: Annotated[
        bool, typer.Option("--undo-rope", help="Keys as before rotation, in float32.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Write a model's KV cache as kvferry's hooks see it.

    Both formats hold `k` and `v` (of MLA models `latent` and `rope_key`), shaped
    (layers, 1, heads, tokens, dim), and `tokens`, the ids that the cache was filled
    with. Layers are those that keep a row for every token. Keys carry RoPE unless
    --undo-rope is given. numpy has no bfloat16: a bfloat16 cache
    becomes float32 in NPZ, and stays what it is in safetensors.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli.lab_input import check_output, open_model
    from kvferry.codec.lab import dump as lab
    from kvferry.codec.lab.text import first_tokens, read_text

    # Mistakes are refused before the model is loaded.
    check_output("--out", out, lab.SUFFIXES)
    if (text is None) == (prompt is None):
        raise ConfigError("--text", str(text), "given, or --prompt, and not both")
    content = read_text(text) if text is not None else prompt or ""
    loaded, identity = open_model(model)
    what = "the prompt" if text is None else str(text)
    if context is None:
        given = loaded.tokenizer.encode(content[: 16 * DEFAULT_CONTEXT] if text else content)
        given = given[:DEFAULT_CONTEXT] if text else given
    else:
        given = first_tokens(loaded.tokenizer, content, context, what)
    if not given:
        raise ConfigError("--text" if text else "--prompt", what, "text of at least one token")
    with progress(f"dumping {model}", len(given) + max_tokens) as bar:
        found = lab.dump(
            loaded, identity, given, max_tokens, undo_rope=undo_rope, report=bar.update
        )
        size = lab.save(found, out)
        bar.update(len(given) + max_tokens)
    stored = dict(lab.stored_dtypes(found, out))
    shapes = {
        name: [s.data.shape[0], 1, *s.data.shape[1:]] for name, s in found.page.streams.items()
    }
    generated = len(found.tokens) - found.prompt_tokens
    if json is not None:
        write_json(
            {
                "model": model,
                "model_id": identity.hex(),
                "file": str(out),
                "bytes": size,
                "tokens": len(found.tokens),
                "prompt_tokens": found.prompt_tokens,
                "generated_tokens": generated,
                "generated_text": loaded.tokenizer.decode(found.tokens[found.prompt_tokens :]),
                "rope_applied": found.rope_applied,
                "cache_dtype": found.cache_dtype.value,
                "stored_dtypes": stored,
                "shapes": shapes,
            },
            json,
        )
    if json != "-":
        for name, shape in shapes.items():
            wide = stored[name] != found.page.streams[name].dtype.value
            note = f" (the cache is {found.cache_dtype.value}; numpy has none)" if wide else ""
            typer.echo(f"{name} {tuple(shape)} {stored[name]}{note}")
        typer.echo(
            f"{out}: {size / 1e6:.1f} MB, {len(found.tokens)} tokens "
            f"({generated} generated), RoPE {'applied' if found.rope_applied else 'undone'}"
        )
