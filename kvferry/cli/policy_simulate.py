"""``kvferry policy simulate``: a cluster on paper, with the optimizer that a real one has."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.output import JsonOption, progress, write_json
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from kvferry.cluster.optimizer.simulated import Run
    from kvferry.proto.v1 import coordinator_pb2 as pb


def simulate(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.toml", show_default=False)],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw it (needs matplotlib).")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Play a scenario file without a cluster: machines, links, a model, a trace of requests.

    The same requests are served three times: with what the optimizer decides,
    with one step for all layers of all nodes, and without stored caches.
    deploy/scenarios/ has examples.
    """
    from kvferry.cluster.optimizer.scenario import load_scenario
    from kvferry.cluster.optimizer.simulate import WAYS, play
    from kvferry.cluster.optimizer.trace import requests_of

    if plot is not None:
        from kvferry.cli.lab_input import check_output
        from kvferry.codec.lab.plot_style import check_matplotlib

        check_matplotlib()
        check_output("--plot", plot, (".png",))
    loaded = load_scenario(scenario, _calibrated)
    work = len(requests_of(loaded))
    if not work:
        raise ConfigError("trace.requests_per_s", loaded.trace.requests_per_s, "one that asks")
    runs: list[Run] = []
    done = 0
    with progress(loaded.name, len(WAYS) * work) as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(done, way)

        for way in WAYS:
            runs.append(play(loaded, way, advance))
    if plot is not None:
        from kvferry.cli.policy_plot import draw_simulation

        draw_simulation(loaded, runs, plot)
    if json:
        write_json(
            {
                "scenario": loaded.name,
                "machines": len(loaded.machines),
                "runs": {run.way: run.figures() for run in runs},
                "bits_per_value": {run.way: run.bits_per_value for run in runs[:2]},
                "changes": [
                    {"second": at, "deadline_s": deadline} for at, deadline in runs[0].changes
                ],
                "tiers": [{"second": at, "tier": tier} for at, tier in runs[0].tiers],
            },
            json,
        )
    if json != "-":
        _print(loaded.name, len(loaded.machines), runs)
        if plot is not None:
            typer.echo(f"drawn: {plot}")


def _calibrated(folder: Path) -> "pb.ModelCurve":
    from kvferry.codec.calibration import CalibrationSet
    from kvferry.node.curve import model_curve

    curve = model_curve(CalibrationSet.load(folder)[0])
    if curve is None:
        allowed = "a calibration with measured curves: `kvferry calibrate` makes one"
        raise ConfigError("model.calibration", str(folder), allowed)
    return curve


def _print(name: str, machines: int, runs: "list[Run]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: {machines} machines", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.way, justify="right")
    figures = [run.figures() for run in runs]
    for found in figures:
        found["stored_mb"] = found["stored_bytes"] / 1e6
    seconds = "{:.3g} s"
    for label, key, form in (
        ("requests", "requests", "{:,.0f}"),
        ("time to first token, median", "ttft_p50_s", seconds),
        ("time to first token, 90th percentile", "ttft_p90_s", seconds),
        ("restore, median", "restore_p50_s", seconds),
        ("restore, 90th percentile", "restore_p90_s", seconds),
        ("tokens restored", "restored_share", "{:.0%}"),
        ("stored", "stored_mb", "{:,.3g} MB"),
        ("mean KL at the end", "kl_nats", "{:.4f} nats"),
        ("changes of policy", "policy_changes", "{:.0f}"),
    ):
        # Without stored caches there is nothing to restore, to store or to lose.
        told = [form.format(f[key]) if f[key] else "-" for f in figures]
        table.add_row(label, *told)
    console = Console()
    console.print(table)
    density = runs[0].bits_per_value
    if len(density) <= 16:
        by_node = ", ".join(f"{node} {bits:.2f}" for node, bits in density.items())
        console.print(f"bits per value at the end: {by_node}", highlight=False)
