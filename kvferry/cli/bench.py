"""``kvferry bench``: what this machine does, in figures."""

from typing import Annotated

import typer

from kvferry.cli.output import JsonOption

bench_app = typer.Typer(help="Measure parts of kvferry on this machine.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(bench_app, name="bench")


@bench_app.command()
def transport(
    size_mib: Annotated[int, typer.Option(min=1, max=128, help="Size of a blob in MiB.")] = 16,
    rounds: Annotated[int, typer.Option(min=3, max=1000, help="Repetitions; medians.")] = 21,
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
        result = asyncio.run(measure(size_mib * MIB, rounds, bar.update))
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        for name in ("put", "get", "put_verified", "get_verified"):
            rate = result[f"{name}_bytes_per_s"]
            typer.echo(f"{name:13} {rate / 1e9:6.2f} GB/s  {result[f'{name}_ratio']:.2f} of raw")  # type: ignore[operator]
