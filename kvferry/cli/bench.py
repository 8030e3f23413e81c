"""``kvferry bench``: what this machine does, in figures."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.bench_bitpack import bitpack
from kvferry.cli.bench_cluster import cluster
from kvferry.cli.options import CalibrationOption, ModelOption
from kvferry.cli.output import JsonOption
from kvferry.errors import ConfigError

bench_app = typer.Typer(help="Measure parts of kvferry on this machine.", no_args_is_help=True)
bench_app.command()(cluster)
bench_app.command()(bitpack)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(bench_app, name="bench")


@bench_app.command()
def transport(
    size_mib: Annotated[int, typer.Option(min=1, max=128, help="Size of a blob in MiB.")] = 16,
    rounds: Annotated[int, typer.Option(min=3, max=1000, help="Repetitions; medians.")] = 21,
    tls: Annotated[bool, typer.Option("--tls", help="With TLS as well.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Blobs put and got over loopback, as a share of a raw blocking socket's rate."""
    import asyncio

    from kvferry.cli.output import progress, write_json
    from kvferry.cluster.allocator import tune_allocator
    from kvferry.cluster.bench_transport import MIB, measure

    tune_allocator()
    total = rounds + max(2, rounds // 10)
    with progress("bench transport", total) as bar:
        result = asyncio.run(measure(size_mib * MIB, rounds, bar.update, tls))
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        for name in ("put", "get", "put_verified", "get_verified"):
            rate = result[f"{name}_bytes_per_s"]
            typer.echo(f"{name:13} {rate / 1e9:6.2f} GB/s  {result[f'{name}_ratio']:.2f} of raw")  # type: ignore[operator]
            if tls:
                rate = result[f"{name}_tls_bytes_per_s"]
                share, beside = (result[f"{name}_tls{of}_ratio"] for of in ("", "_vs_raw_tls"))
                typer.echo(
                    f"  over TLS    {rate / 1e9:6.2f} GB/s  {share:.2f} of raw, "  # type: ignore[operator]
                    f"{beside:.2f} of raw TLS"
                )


@bench_app.command()
def codec(
    model: ModelOption = "smollm2",
    target_kl: Annotated[
        float, typer.Option(metavar="NATS", help="Where on the calibration's curve.")
    ] = 0.005,
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16 or float32. Default: that of the model's cache."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text of 2048 tokens. Default: Python's argparse."),
    ] = None,
    calibration: CalibrationOption = None,
    rounds: Annotated[int, typer.Option(min=3, max=1000, help="Repetitions; medians.")] = 15,
    prefills: Annotated[int, typer.Option(min=1, max=100, help="Prefills of 2048 tokens.")] = 3,
    json_file: JsonOption = None,
) -> None:
    """A page of all layers against its matrix products alone, and prefill.

    Pages are the model's own, coded with its calibration. Each encode and
    decode is timed next to its products alone; the ratios are medians.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    import argparse

    from kvferry.cli import lab_input as given
    from kvferry.cli.output import progress, write_json
    from kvferry.codec.base import DType
    from kvferry.codec.lab.bench_codec import RUN_TOKENS, Bench
    from kvferry.codec.lab.text import first_tokens, read_text

    kinds = [kind.value for kind in DType]
    if dtype is not None and dtype not in kinds:
        raise ConfigError("--dtype", dtype, f"one of {', '.join(kinds)}")
    source = text or Path(argparse.__file__)
    content = read_text(source)
    loaded, identity = given.open_model(model)
    known = given.calibration_of("ferry", calibration, identity)
    tokens = first_tokens(loaded.tokenizer, content, RUN_TOKENS, str(source))
    bench = Bench(
        loaded=loaded,
        model_id=identity,
        groups=known.groups,
        curve=known.curve,
        options={"target_kl": target_kl},
        dtype=None if dtype is None else DType(dtype),
        rounds=rounds,
        prefills=prefills,
    )
    with progress("bench codec", bench.work) as bar:
        result = {"calibration_id": known.id.hex(), **bench.run(tokens, bar.update)}
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        for name in ("encode", "decode", "decode_run"):
            typer.echo(f"{name:12} {result[f'{name}_vs_gemm']:5.2f} x its matrix products")
        typer.echo(
            f"decoded {result['decode_tokens_per_second']:,.0f} tokens/s "
            f"({float(str(result['decode_fp16_bytes_per_second'])) / 1e6:,.0f} MB/s of fp16), "
            f"prefilled {result['prefill_tokens_per_second']:,.0f} tokens/s: "
            f"{result['decode_vs_prefill']:.0f} x"
        )


@bench_app.command()
def restore(
    model: ModelOption = "smollm2",
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=130, max=32768, help="Length of a prefix; repeat. Default: 512 to 4096."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Prefills of each length.")] = 3,
    cold_starts: Annotated[int, typer.Option(min=0, max=20, help="Fresh processes.")] = 2,
    sweep_tokens: Annotated[
        int, typer.Option(min=0, max=32768, help="Prefix behind a throttled link; 0: leave out.")
    ] = 1024,
    sweep_rounds: Annotated[int, typer.Option(min=1, max=20, help="Per bandwidth.")] = 2,
    offload_tokens: Annotated[
        int, typer.Option(min=0, max=32768, help="Offered while generating; 0: leave out.")
    ] = 2048,
    offload_rounds: Annotated[int, typer.Option(min=2, max=200, help="Pairs of windows.")] = 11,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw it (needs matplotlib).")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Restores from a store over loopback against prefill; throttled links; offers.

    Starts store, coordinator and a node daemon that keeps nothing itself. Also
    measured: that no link is so slow that kvferry costs time, and what an offer
    that is encoded in the background costs a generation.
    """
    from kvferry.codec.mlx.openblas import ensure_openblas

    ensure_openblas()
    from kvferry.cli import lab_input as given
    from kvferry.cli.bench_restore import RestorePlanned, run
    from kvferry.cli.demo.scenario import ensure_calibration
    from kvferry.cli.output import progress, write_json
    from kvferry.codec.lab.plot_style import check_matplotlib
    from kvferry.codec.mlx.load import load_model
    from kvferry.node.hooks.bench_restore import LENGTHS

    if out is not None:
        check_matplotlib()
        given.check_output("--out", out, (".png",))
    plan = RestorePlanned(
        model=model,
        lengths=sorted(set(tokens or LENGTHS)),
        rounds=rounds,
        cold_starts=cold_starts,
        sweep_tokens=sweep_tokens,
        sweep_rounds=sweep_rounds,
        offload_tokens=offload_tokens,
        offload_rounds=offload_rounds,
    )
    ensure_calibration(model)
    loaded = load_model(model)
    with progress("bench restore", plan.work) as bar:
        result = run(loaded, plan, bar)
    if out is not None:
        from kvferry.node.hooks.bench_plot import draw_restore

        draw_restore(result, out)
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        for point in result["points"]:
            typer.echo(
                f"{point['tokens']:5} tokens: prefill {point['prefill_seconds']:6.2f} s, "
                f"restore {point['restore_seconds']:5.2f} s, {point['speedup']:5.1f} x, "
                f"{point['bytes'] / 1e6:5.2f} MB"
            )
        for name in ("cold_speedup", "never_slower", "slowdown_pct"):
            if name in result:
                typer.echo(f"{name}: {result[name]}")
