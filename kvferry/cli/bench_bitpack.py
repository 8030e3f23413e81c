"""``kvferry bench bitpack``: the live packed cache beside a plain one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli.options import ModelOption
from kvferry.cli.output import JsonOption


def bitpack(
    model: ModelOption = "smollm2",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to read. Default: Python's argparse.")
    ] = None,
    prompt: Annotated[  # of fewer than the sinks and a block nothing is packed
        int, typer.Option(min=132, max=32768, help="Tokens read first.")
    ] = 512,
    continuation: Annotated[
        int, typer.Option(min=1, max=32768, help="Tokens to measure perplexity on.")
    ] = 128,
    generate: Annotated[int, typer.Option(min=1, max=4096, help="Tokens to generate.")] = 100,
    json_file: JsonOption = None,
) -> None:
    """A cache that stays packed to 6 or 8 bits while the model generates.

    Token match, perplexity, error of K and V, memory, and time, against a plain
    cache in the same run.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    import argparse

    from kvferry.cli.output import progress, write_json
    from kvferry.codec.lab import bitpack_table as table
    from kvferry.codec.lab.text import first_tokens, read_text
    from kvferry.codec.mlx.load import load_model

    source = text or Path(argparse.__file__)
    content = read_text(source)
    loaded = load_model(model)
    tokens = first_tokens(loaded.tokenizer, content, prompt + continuation + 1, str(source))
    total = 0
    with progress("bench bitpack", table.work(prompt, continuation, generate)) as bar:

        def done(count: int) -> None:
            nonlocal total
            total += count
            bar.update(total)

        result = table.measure(loaded, tokens, prompt, generated=generate, done=done)
    result["text"] = source.name
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        _show(result)


def _show(result: Mapping[str, Any]) -> None:
    memory = result["memory"]
    plain = memory["cache_plain"]
    held = result["prompt_tokens"] + result["generated_tokens"]
    typer.echo(f"{result['model']}, {held} tokens; a plain token takes "
               f"{result['step_ms_plain']:.1f} ms, the cache {plain / 1e6:.1f} MB "
               f"(fp16: {memory['cache_fp16'] / 1e6:.1f}), "
               f"weights {memory['weights_fp32'] / 1e6:.0f} MB in fp32"
               + ("" if memory["weights_in_files"] is None
                  else f", {memory['weights_in_files'] / 1e6:.0f} MB in files"))  # fmt: skip
    for row in result["rows"]:
        first = row["first_difference"]
        typer.echo(
            f"{row['bits']} bits: cache {row['cache_bytes'] / 1e6:.1f} MB "
            f"({row['bits_per_value']:.2f} bits/value), KL {row['kl_mean']:.5f}, "
            f"same top-1 {100 * row['top1_agreement']:.1f} %, "
            + ("no token differs" if first is None else f"first other token: {first + 1}")
            + f", unpacking {row['share_pct']:.0f} % of a token's time"
        )
        for target in result["targets"]:
            if target["bits"] == row["bits"]:
                state = "met" if target["met"] else "NOT met"
                why = f": {target['why']}" if target["why"] else ""
                typer.echo(
                    f"  {target['target']:58} {target['measured']:8.2f}  "
                    f"wanted {target['wanted']:6} {state}{why}"
                )
